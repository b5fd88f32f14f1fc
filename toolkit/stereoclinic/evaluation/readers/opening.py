"""Readers by name: `open_reader` opens what `--reader` names. A new kind is a file, and a row and a branch here.

Several readers as one: the mean of what they read, and what each of them read.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError, first_line
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
from stereoclinic.evaluation.readers.portraits import PortraitsReader
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


#: The form of a reader's name -> what it is.
KINDS = {
    "portraits": "the reader in the model's own folder",
    "FOLDER": "one that stereoclinic.portraits.train wrote",
    "clip": "CLIP, asked in the axis's words",
    "clip:MODEL": "the same, another CLIP model: a hub id or a folder",
    "hf:MODEL": "an image classifier: a hub id or a folder",
    "ensemble:A,B": "the mean of several of these",
    "FILE.py:CLASS": "a class of your own, run only where that is asked for",
}


def open_reader(
    spec: str,
    axes: Sequence[Axis],
    own: Path | None = None,
    classes: Iterable[str] = (),
    allow_race: bool = False,
    allow_code: bool = False,
    device: str = "cpu",
) -> Reader:
    """The reader of this name.

    Args:
        spec: As in `KINDS`.
        axes: What it is to read: the first it must know, the others where it can (`can_read` says which).
        own: The folder of the reader that the model brings, for "portraits".
        classes: For "hf:MODEL": CLASS=GROUP,... or a .toml or .json file, see `parse_classes`.
        allow_race: Let CLIP read race, ethnicity and skin tone, on which it is often wrong.
        allow_code: Run FILE.py.
        device: For models that are opened here.

    Raises:
        InputError: No such reader, it cannot be opened, or it cannot tell the first axis's groups apart.
    """
    classes = tuple(classes)
    if classes and "hf:" not in spec:
        raise InputError(f"--reader-classes is for hf:MODEL readers; {spec!r} has classes of its own")

    def opened(spec: str) -> Reader:
        kind, _, rest = spec.partition(":")
        if spec == "portraits":
            if own is None:
                raise InputError("reader 'portraits' is the one in the model's folder, and this model brings none")
            return PortraitsReader(own)
        if kind == "clip":
            from stereoclinic.evaluation.readers.clip import DEFAULT, ClipReader

            return ClipReader(rest or DEFAULT, axes, allow_race, device)
        if kind == "hf" and rest:
            from stereoclinic.evaluation.readers.hugging_face import HuggingFaceReader, parse_classes

            return HuggingFaceReader(rest, axes, parse_classes(classes), device)
        if kind == "ensemble":
            return EnsembleReader([opened(part.strip()) for part in rest.split(",") if part.strip()], axes)
        if kind.endswith(".py") and rest:
            return _from_file(Path(kind), rest, allow_code)
        if spec and Path(spec).is_dir():
            return _from_folder(Path(spec))
        raise InputError(f"unknown reader {spec!r}; choose one of {', '.join(KINDS)}")

    reader = opened(spec.strip())
    if axes:
        group_columns(reader, axes[0])
    return reader


def _from_folder(folder: Path) -> Reader:
    if not (folder / "config.json").is_file():
        raise InputError(f"reader '{folder}': no config.json in this folder, so no reader")
    if (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists():
        raise InputError(f"reader '{folder}': a transformers model; open it by hf:{folder} or clip:{folder}")
    return PortraitsReader(folder)


def _from_file(path: Path, name: str, allowed: bool) -> Reader:
    """An object of a class in the user's own file."""
    if not allowed:
        raise InputError(f"reader '{path}:{name}' is code; add --allow-code to run it")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"reader '{path}:{name}': no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        reader: Any = getattr(module, name)()
    except Exception as error:  # whatever the user's code raises
        what = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"reader '{path}:{name}' cannot be made: {what}") from error
    return as_reader(reader)
