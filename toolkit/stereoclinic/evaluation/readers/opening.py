"""Readers by name: `open_reader` opens what `--reader` names, by the rows of `reader_kinds.KINDS`."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from stereoclinic.errors import InputError, first_line
from stereoclinic.evaluation.reader_kinds import KINDS, Request, kind_of
from stereoclinic.evaluation.readers.base import Reader, as_reader, group_columns
from stereoclinic.prompts.axes import Axis


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
        spec: Of one of the forms in `KINDS`.
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
        open_kind = resolve_name(KINDS[kind_of(spec)])
        model = spec.partition(":")[2]
        reader: Reader = open_kind(Request(spec, model, axes, opened, own, classes, allow_race, allow_code, device))
        return reader

    reader = opened(spec.strip())
    if axes:
        group_columns(reader, axes[0])
    return reader


def open_code(request: Request) -> Reader:
    """`FILE.py:CLASS`: an object of a class in the user's own file."""
    path, name = Path(request.spec.partition(":")[0]), request.model
    if not request.allow_code:
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
