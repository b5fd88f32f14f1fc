"""Readers by name: `open_reader` turns what `--reader` says into one. A new kind is a file of its own and one row.

Several readers as one: the mean of what they read, and whether they agree.

Two readers that err on different pictures check each other. Where some can say that a picture shows no group, that is
averaged too, and a reader that sees none has the less to say on which. What each of them read of the groups is given
beside the mean, one entry an axis: `by_reader_key(axis)` -> (n, readers, K), in the order of `EnsembleReader.readers`.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError, first_line
from stereoclinic.evaluation.readers.base import (
    REST,
    KnownError,
    Reader,
    can_read,
    features_of,
    group_columns,
    groups_seen,
    head_of,
    known_errors,
    limits,
    sees_none,
)
from stereoclinic.evaluation.readers.portraits import PortraitsReader
from stereoclinic.evaluation.readers.pretrained import parse_classes
from stereoclinic.prompts.axes import Axis

#: How a reader is named -> what it is.
KINDS = {
    "portraits": "the reader in the model's own folder",
    "FOLDER": "one that stereoclinic.portraits.train wrote",
    "clip": "CLIP, asked in the axis's words",
    "clip:MODEL": "the same, another CLIP model: a hub id or a folder",
    "hf:MODEL": "an image classifier: a hub id or a folder",
    "ensemble:A,B": "the mean of several of these",
    "FILE.py:CLASS": "a class of your own, run only where that is asked for",
}


@dataclass(frozen=True)
class _Options:
    axes: tuple[Axis, ...]
    own: Path | None
    classes: tuple[str, ...]
    allow_race: bool
    allow_code: bool
    device: str


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
        device: Where models run that are opened here.

    Raises:
        InputError: No such reader, it cannot be opened, or it cannot tell the first axis's groups apart.
    """
    options = _Options(tuple(axes), own, tuple(classes), allow_race, allow_code, device)
    if options.classes and "hf:" not in spec:
        raise InputError(f"--reader-classes is for hf:MODEL readers; {spec!r} has classes of its own")
    reader = _open(spec.strip(), options)
    if axes:
        group_columns(reader, axes[0])
    return reader


def _open(spec: str, options: _Options) -> Reader:
    kind, _, rest = spec.partition(":")
    if spec == "portraits":
        if options.own is None:
            raise InputError("reader 'portraits' is the one in the model's folder, and this model brings none")
        return PortraitsReader(options.own)
    if kind == "clip":
        from stereoclinic.evaluation.readers.clip import DEFAULT, ClipReader

        return ClipReader(rest or DEFAULT, options.axes, options.allow_race, options.device)
    if kind == "hf" and rest:
        from stereoclinic.evaluation.readers.hugging_face import HuggingFaceReader

        return HuggingFaceReader(rest, options.axes, parse_classes(options.classes), options.device)
    if kind == "ensemble":
        return EnsembleReader([_open(each.strip(), options) for each in rest.split(",") if each.strip()], options.axes)
    if kind.endswith(".py") and rest:
        return _from_file(Path(kind), rest, options.allow_code)
    if spec and Path(spec).is_dir():
        if not (Path(spec) / "config.json").is_file():
            raise InputError(f"reader {spec!r}: no config.json in this folder, so no reader")
        if (Path(spec) / "preprocessor_config.json").exists() or (Path(spec) / "processor_config.json").exists():
            raise InputError(f"reader {spec!r}: a transformers model; open it by hf:{spec} or clip:{spec}")
        return PortraitsReader(Path(spec))
    raise InputError(f"unknown reader {spec!r}; there are {', '.join(KINDS)}")


def _from_file(path: Path, name: str, allowed: bool) -> Reader:
    """An object of a class in the user's own file."""
    if not allowed:
        raise InputError(f"reader '{path}:{name}' is code, which is run only where that is asked for: --allow-code")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"reader '{path}:{name}': no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        reader: Reader = getattr(module, name)()
    except Exception as error:  # whatever the user's code raises
        what = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"reader '{path}:{name}' cannot be made: {what}") from error
    if missing := [each for each in ("name", "classes", "read") if not hasattr(reader, each)]:
        raise InputError(f"reader '{path}:{name}' has no {', '.join(missing)}; see evaluation/readers/base.py")
    return reader


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
