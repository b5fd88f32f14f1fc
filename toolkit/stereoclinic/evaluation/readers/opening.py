"""Readers by name: `open_reader` opens what `--reader` names. A new kind is a file, and a row and a branch here."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stereoclinic.errors import InputError, first_line
from stereoclinic.evaluation.readers.base import Reader, as_reader, group_columns
from stereoclinic.evaluation.readers.ensemble import EnsembleReader
from stereoclinic.evaluation.readers.portraits import PortraitsReader
from stereoclinic.prompts.axes import Axis

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
        raise InputError(f"unknown reader {spec!r}; there are {', '.join(KINDS)}")

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
        raise InputError(f"reader '{path}:{name}' is code, which is run only where that is asked for: --allow-code")
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
