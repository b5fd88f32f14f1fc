"""The base class of readers, and which groups of an axis a reader sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.io.digest import weights_digest
from stereoclinic.prompts.axes import Axis

if TYPE_CHECKING:
    from stereoclinic.prompts.sets import Row

#: The class of everything that shows no group.
REST = "(no group)"


@dataclass(frozen=True)
class KnownError:
    """How often a reader is right, as measured elsewhere.

    Args:
        what: What was read, such as "gender".
        accuracy: Share of images it was right on, from 0 to 1.
        data: The images.
        source: Where the figure comes from.
    """

    what: str
    accuracy: float
    data: str
    source: str

    def __str__(self) -> str:
        return f"{self.what}: right on {self.accuracy:.1%} of {self.data} ({self.source})"


class Reader:
    """A classifier of images. A class of your own needs `name`, `classes` and `read` only, see `as_reader`."""

    name: str
    classes: dict[str, tuple[str, ...]]  # head, such as "gender" -> its classes
    limits: tuple[str, ...] = ()  # sentences: what it cannot tell
    known_errors: tuple[KnownError, ...] = ()
    by_person: bool = False  # whether `read` takes the person in each image
    only_named: bool = False  # whether an axis's file must name the head, as a head of its name may mean another
    remarks: Sequence[str] | None = None  # n, of the last `read`: what is kept with each image, such as an answer

    def read(self, images: Tensor, persons: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Class probabilities.

        Args:
            images: (n, 3, H, W) in [0, 1].
            persons: n, such as "doctor"; given where `by_person` is set.

        Returns:
            Head -> (n, classes).
        """
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor | None:
        """(n, 3, H, W) in [0, 1] -> (n, F) for Frechet distances; None from a reader that has no features."""
        return None


class _Wrapped(Reader):
    """A user's own object; what it lacks is as in `Reader`."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        for name in ("name", "classes", "limits", "known_errors", "by_person", "only_named"):
            setattr(self, name, getattr(wrapped, name, getattr(self, name, None)))

    def read(self, images: Tensor, persons: Sequence[str] | None = None) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = self.wrapped.read(images, *([persons] if self.by_person else []))
        self.remarks = getattr(self.wrapped, "remarks", None)
        return seen

    def features(self, images: Tensor) -> Tensor | None:
        return self.wrapped.features(images) if callable(getattr(self.wrapped, "features", None)) else None


def as_reader(reader: Any) -> Reader:
    """A reader from any object with `name`, `classes` and `read`; raises InputError where one is missing."""
    if isinstance(reader, Reader):
        return reader
    if missing := [name for name in ("name", "classes", "read") if not hasattr(reader, name)]:
        raise InputError(f"reader {type(reader).__name__} has no {', '.join(missing)}; see evaluation/readers/base.py")
    return _Wrapped(reader)


def head_of(reader: Reader, axis: Axis) -> str | None:
    """The head that the axis names for this reader, else the one of its own name; None where that must be named."""
    return axis.reader.get(reader.name, None if reader.only_named else axis.name)


def group_columns(reader: Reader, axis: Axis) -> tuple[str, list[int]]:
    """The head that reads an axis, and the column of each group in its output.

    Raises:
        InputError: There is none, or it has no class for a group.
    """
    reader = as_reader(reader)
    head = head_of(reader, axis)
    if head is None or head not in reader.classes:
        known = ", ".join(name for name in reader.classes if name != "occupation") or "none"
        raise InputError(
            f"reader {reader.name!r} cannot tell the groups of axis {axis.name!r} apart; axes it can read: {known}."
            " Give another --reader"
        )
    classes = reader.classes[head]
    if missing := [group for group in axis.groups if group not in classes]:
        raise InputError(
            f"reader {reader.name!r} has no class for {', '.join(missing)}; {head!r} has {', '.join(classes)}"
        )
    return head, [classes.index(group) for group in axis.groups]


def can_read(reader: Reader, axis: Axis) -> bool:
    """Whether the reader has a class for each group of an axis."""
    try:
        group_columns(reader, axis)
    except InputError:
        return False
    return True


def sees_none(reader: Reader, axis: Axis) -> bool:
    """Whether the axis's head has classes of no group."""
    head, columns = group_columns(reader, axis)
    return len(reader.classes[head]) > len(columns)


def groups_seen(reader: Reader, axis: Axis, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Probabilities of an axis's groups, and of no group ("no face").

        reads_k  = m_k / sum_g m_g                          m: the head's output, g over the groups
        no group = 1 - sum_g m_g / sum of all classes

    Args:
        reader: Who read.
        axis: K groups.
        seen: What `Reader.read` gave for n images.

    Returns:
        (n, K) probabilities of the groups, which sum to 1 (uniform where the groups have none), and (n,) the
        probability of no group; None from a reader that has no such class.
    """
    head, columns = group_columns(reader, axis)
    shown = seen[head][:, columns]
    total = shown.sum(1, keepdim=True)
    if not sees_none(reader, axis):
        return shown / total, None
    none = 1 - total[:, 0] / seen[head].sum(1)
    return torch.where(total > 0, shown / total, 1 / len(columns)), none.clamp(0, 1)


def read_rows(reader: Reader, images: Tensor, rows: "Sequence[Row]") -> dict[str, Tensor]:
    """`Reader.read` for images (n, 3, H, W) of n prompts, rows with the column `label`."""
    reader = as_reader(reader)
    return reader.read(images, [row["label"] for row in rows]) if reader.by_person else reader.read(images)


def fingerprint(reader: Any) -> list[Any]:
    """Plain data that identifies a reader: names, classes, weights. Of a user's own class no more can be known."""
    if reader is None:
        return []
    reader = getattr(reader, "wrapped", reader)
    modules = {name: each for name, each in getattr(reader, "__dict__", {}).items() if isinstance(each, nn.Module)}
    return [
        reader.name,
        reader.classes,
        getattr(reader, "columns", None),  # of a classifier, that show each group
        {name: weights_digest(each) for name, each in modules.items()},
        [fingerprint(each) for each in getattr(reader, "readers", ())],
    ]
