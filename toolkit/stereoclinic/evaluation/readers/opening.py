"""Readers by name: `open_reader` turns what `--reader` says into one. A new kind is a file of its own and one row."""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stereoclinic.axes import Axis
from stereoclinic.errors import InputError, first_line
from stereoclinic.evaluation.readers.base import Reader, group_columns
from stereoclinic.evaluation.readers.classes import parse_classes
from stereoclinic.evaluation.readers.portraits import PortraitsReader

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
        from stereoclinic.evaluation.readers.ensemble import EnsembleReader

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
