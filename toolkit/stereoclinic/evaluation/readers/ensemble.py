"""Several readers as one: the mean of what they read, and what each of them read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.reader_kinds import Request
from stereoclinic.evaluation.readers.base import (
    REST,
    Reader,
    as_reader,
    can_read,
    group_columns,
    groups_seen,
    head_of,
    sees_none,
)
from stereoclinic.prompts.axes import Axis


def by_reader_key(axis: str) -> str:
    """Under which `EnsembleReader.read` gives what each reader read of an axis."""
    return f"{axis} by reader"


class EnsembleReader(Reader):
    """Mean of the probabilities of several readers, of equal weight.

    Where some can say that an image shows no group, that is averaged too; a reader that sees none has the less weight
    on which group it is.

    Args:
        readers: Two or more.
        axes: Those that are read: the first, which all must know, and of the others those that all know.

    Raises:
        InputError: Fewer than two readers, the same twice, or one that cannot read the first axis.
    """

    def __init__(self, readers: Sequence[Any], axes: Sequence[Axis]) -> None:
        self.readers = tuple(as_reader(reader) for reader in readers)
        names = [reader.name for reader in self.readers]
        if len(readers) < 2 or len(set(names)) < len(names):
            raise InputError(f"an ensemble needs two or more different readers; given: {', '.join(names) or 'none'}")
        for reader in self.readers if axes else ():
            group_columns(reader, axes[0])  # refused with what it can read
        self.name = f"ensemble:{','.join(names)}"
        self.axes = tuple(axis for axis in axes if all(can_read(reader, axis) for reader in self.readers))
        self.classes = {
            axis.name: (*axis.groups, REST) if any(sees_none(reader, axis) for reader in self.readers) else axis.groups
            for axis in self.axes
        }
        # Other heads, such as the occupation, are those of the first reader that has them.
        self._alone = {head: reader for reader in reversed(self.readers) for head in reader.classes}
        for axis in axes:
            for reader in self.readers:
                self._alone.pop(head_of(reader, axis) or axis.name, None)
        self.classes |= {head: reader.classes[head] for head, reader in self._alone.items()}
        self.by_person = any(reader.by_person for reader in self.readers)
        self.limits = tuple(f"{reader.name}: {limit}" for reader in self.readers for limit in reader.limits)
        self.known_errors = tuple(error for reader in self.readers for error in reader.known_errors)

    def read(self, images: Tensor, persons: Sequence[str] | None = None) -> dict[str, Tensor]:
        """(n, 3, H, W) in [0, 1] -> (n, classes) for each head, and (n, readers, K) by each reader of each axis."""
        seen = [reader.read(images, persons) if reader.by_person else reader.read(images) for reader in self.readers]
        said = [[f"{reader.name}: {remark}" for remark in reader.remarks] for reader in self.readers if reader.remarks]
        self.remarks = list(map("; ".join, zip(*said, strict=True))) or None
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
        return found | {head: seen[self.readers.index(reader)][head] for head, reader in self._alone.items()}

    def features(self, images: Tensor) -> Tensor | None:
        """(n, F) of the first reader that has features; None if none has."""
        every = (reader.features(images) for reader in self.readers)
        return next((features for features in every if features is not None), None)


def _groups(reader: Reader, axis: Axis, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Probabilities of the axis's groups, (n, K) summing to 1, and of no group, (n,)."""
    reads, none = groups_seen(reader, axis, {head: each.double() for head, each in seen.items()})
    return reads.float(), torch.zeros(len(reads)) if none is None else none.float()


def open_ensemble(request: Request) -> Reader:
    """The readers `A,B` of `ensemble:A,B`."""
    names = [part.strip() for part in request.model.split(",") if part.strip()]
    return EnsembleReader([request.open_other(name) for name in names], request.axes)
