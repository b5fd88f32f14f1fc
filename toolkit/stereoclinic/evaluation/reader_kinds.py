"""The kinds of readers, by the form of their names. A new kind is a row of `KINDS`.

The help text of `--reader`, `open_reader` and the error for an unknown reader all use this table. It imports no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from stereoclinic.evaluation.readers.base import Reader
    from stereoclinic.prompts.axes import Axis

_HERE = "stereoclinic.evaluation.readers"
#: The form of a reader's name -> "module:function" that opens one: it takes a `Request` and returns a `Reader`. The
#: first form that fits a name is taken. A word stands for itself, what follows its colon for any text.
KINDS = {
    "portraits": f"{_HERE}.portraits:open_own",
    "clip": f"{_HERE}.clip:open_clip",
    "clip:MODEL": f"{_HERE}.clip:open_clip",
    "hf:MODEL": f"{_HERE}.hugging_face:open_classifier",
    "ita": f"{_HERE}.ita:open_ita",
    "ensemble:A,B": f"{_HERE}.ensemble:open_ensemble",
    "FILE.py:CLASS": f"{_HERE}.opening:open_code",
    "FOLDER": f"{_HERE}.portraits:open_folder",
}


@dataclass(frozen=True)
class Request:
    """What a reader is opened with.

    Args:
        spec: Its name.
        model: What follows the colon in it.
        axes: What it is to read; the first it must know.
        open_other: Opens another reader, by its name.
        own: The folder of the reader that the pipeline brings.
        classes: Given classes and the groups that they show, see `hugging_face.parse_classes`.
        allow_race: Let CLIP read race, ethnicity and skin tone.
        allow_code: Run the user's own code.
        device: Where its model runs.
    """

    spec: str
    model: str
    axes: "Sequence[Axis]"
    open_other: "Callable[[str], Reader]"
    own: Path | None = None
    classes: tuple[str, ...] = ()
    allow_race: bool = False
    allow_code: bool = False
    device: str = "cpu"


def kind_of(spec: str) -> str:
    """The form in `KINDS` that a reader's name has; raises InputError where it has none."""
    for form in KINDS:
        if _fits(spec, form):
            return form
    raise InputError(f"unknown reader {spec!r}; choose one of {', '.join(KINDS)}")


def _fits(spec: str, form: str) -> bool:
    word, colon, rest = spec.partition(":")
    if form == "FOLDER":
        return bool(spec) and Path(spec).is_dir()
    if form == "FILE.py:CLASS":
        return word.endswith(".py") and bool(rest)
    return word == form.partition(":")[0] and bool(colon) == bool(rest) == (":" in form)
