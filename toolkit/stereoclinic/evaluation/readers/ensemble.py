"""Several readers as one: the mean of what they read, and whether they agree.

Two readers that err on different pictures check each other. Where some can say that a picture shows no group, that is
averaged too, and a reader that sees none has the less to say on which. What each of them read of the groups is given
beside the mean, one entry an axis: `by_reader_key(axis)` -> (n, readers, K), in the order of `EnsembleReader.readers`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers.base import (
    REST,
    KnownError,
    can_read,
    features_of,
    group_columns,
    groups_seen,
    head_of,
    known_errors,
    limits,
    sees_none,
)


def by_reader_key(axis: str) -> str:
    """Under which `EnsembleReader.read` gives what each reader read of an axis."""
    return f"{axis} by reader"


class EnsembleReader:
    """Mean of the probabilities of several readers, each of the same weight.

    Args:
        readers: Two or more.
        axes: Those that are read: the first, which all must know, and of the others those that all know.

    Raises:
        InputError: Fewer than two readers, the same twice, or one that cannot read the first axis.
    """

    def __init__(self, readers: Sequence[Any], axes: Sequence[Axis]) -> None:
        names = [reader.name for reader in readers]
        if len(readers) < 2 or len(set(names)) < len(names):
            raise InputError(f"an ensemble needs two or more different readers; given: {', '.join(names) or 'none'}")
        for reader in readers if axes else ():
            group_columns(reader, axes[0])  # refused with what it can read
        self.readers = tuple(readers)
        self.name = f"ensemble:{','.join(names)}"
        self.axes = tuple(axis for axis in axes if all(can_read(reader, axis) for reader in readers))
        self.classes = {
            axis.name: (*axis.groups, REST) if any(sees_none(reader, axis) for reader in readers) else axis.groups
            for axis in self.axes
        }
        # What one of them alone knows, such as the occupation, is taken from it.
        self._alone = {head: reader for reader in reversed(readers) for head in reader.classes}
        for axis in axes:
            for reader in readers:
                self._alone.pop(head_of(reader, axis) or axis.name, None)
        self.classes |= {head: reader.classes[head] for head, reader in self._alone.items()}
        self.by_person = any(getattr(reader, "by_person", False) for reader in readers)

    @property
    def limits(self) -> tuple[str, ...]:
        """What each of them cannot tell."""
        return tuple(f"{reader.name}: {said}" for reader in self.readers for said in limits(reader))

    @property
    def known_errors(self) -> tuple[KnownError, ...]:
        """How often each of them is wrong; how often their mean is, is not known."""
        return tuple(each for reader in self.readers for each in known_errors(reader))

    def read(self, images: Tensor, persons: Sequence[str] | None = None) -> dict[str, Tensor]:
        """(n, 3, H, W) in [0, 1] -> (n, classes) for each axis, and (n, readers, K) by each of them."""
        seen = [
            reader.read(images, persons) if getattr(reader, "by_person", False) else reader.read(images)
            for reader in self.readers
        ]
        found: dict[str, Tensor] = {}
        for axis in self.axes:
            each = [_groups(reader, axis, own) for reader, own in zip(self.readers, seen, strict=True)]
            found[by_reader_key(axis.name)] = by_reader = torch.stack([reads for reads, _ in each], 1)
            if REST in self.classes[axis.name]:
                none = torch.stack([rest for _, rest in each], 1)  # (n, readers)
                of_groups = (by_reader * (1 - none)[..., None]).mean(1)
                found[axis.name] = torch.cat([of_groups, none.mean(1, keepdim=True)], 1)
            else:
                found[axis.name] = by_reader.mean(1)
        for head, reader in self._alone.items():
            found[head] = seen[self.readers.index(reader)][head]
        return found

    def features(self, images: Tensor) -> Tensor | None:
        """(n, F) of the first reader that has features; None if none has."""
        for reader in self.readers:
            if (found := features_of(reader, images)) is not None:
                return found
        return None


def _groups(reader: Any, axis: Axis, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a reader read of the axis's groups, (n, K) summing to 1, and of none of them, (n,)."""
    reads, none = groups_seen(reader, axis, {head: each.double() for head, each in seen.items()})
    return reads.float(), torch.zeros(len(reads)) if none is None else none.float()
