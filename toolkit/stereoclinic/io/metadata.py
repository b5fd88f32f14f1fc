"""The metadata of masks and relevance, checked once, when a file is read.

Later code reads these entries and relies on their form. Other entries are kept and shown unchanged.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from stereoclinic.errors import InputError
from stereoclinic.io.reading import is_name

#: Characters of a text that is no name: a prompt, a path.
LONGEST_TEXT = 5000


def _checked(name: str) -> str:
    if not is_name(name):
        raise ValueError("no name")
    return name


_Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
_Number = int | Annotated[float, Field(allow_inf_nan=False)]

#: What is expected, in words, and the check of it.
_Form = tuple[str, TypeAdapter[Any]]
_TEXT: _Form = (f"text of up to {LONGEST_TEXT} characters", TypeAdapter(_Text))
_TEXTS: _Form = ("a list of such texts", TypeAdapter(list[_Text]))
_WHOLE: _Form = ("a whole number", TypeAdapter(int))
_NUMBER: _Form = ("a number", TypeAdapter(_Number))
_TABLE: _Form = ("a table", TypeAdapter(dict[str, Any]))
_TABLES: _Form = ("a list of tables", TypeAdapter(list[dict[str, Any]]))
_SEEDS: _Form = ("the first and the last seed", TypeAdapter(Annotated[list[int], Field(min_length=2, max_length=2)]))
_NAMES: _Form = ("a list of names", TypeAdapter(list[Annotated[str, AfterValidator(_checked)]]))

_MADE: dict[str, _Form] = {
    "axis": _TEXT, "words": _NAMES, "labels": _TEXTS, "model": _TEXT, "call": _TABLE, "unet_shapes": _TEXT,
    "unet_weights": _TEXT, "prompts": _TEXT, "samples": _WHOLE, "dropped": _WHOLE, "seeds": _SEEDS, "patterns": _TEXTS,
    "composite": _TEXT, "root": _TEXT, "target": _TEXT, "steps": _WHOLE, "every": _WHOLE, "guidance": _NUMBER,
    "selection": _TABLE, "adjusted": _TABLES, "dose": _TABLE,
}  # fmt: skip
_SELECTION: dict[str, _Form] = {"method": _TEXT, "root": _TEXT, "bins": _TABLES}
_BIN: dict[str, _Form] = dict.fromkeys(("from", "to", "lean_before", "lean_after", "off_axis"), _NUMBER)
_DOSE: dict[str, _Form] = {"seeds": _SEEDS, "earlier": _TABLE}


def check_metadata(metadata: Any) -> None:
    """Refuse metadata with an entry of another form than later code relies on; None means unknown.

    Raises:
        InputError: Names the entry.
    """
    waiting: list[tuple[Any, dict[str, _Form], str]] = [(metadata, _MADE, "")]
    for table, forms, where in waiting:
        if not isinstance(table, dict):
            raise InputError(f"metadata {where}".rstrip(". ") + f" is a {type(table).__name__}; expected a dict")
        for key, (expected, check) in forms.items():
            try:
                if (value := table.get(key)) is not None:
                    check.validate_python(value, strict=True)
            except ValidationError as error:
                raise InputError(f"metadata {where}{key} is {value!r:.60}; expected {expected}") from error
        if forms is _MADE:
            waiting.append((table.get("selection") or {}, _SELECTION, f"{where}selection."))
            waiting.append((table.get("dose") or {}, _DOSE, f"{where}dose."))
        elif forms is _SELECTION:
            waiting += [(each, _BIN, f"{where}bins.") for each in table.get("bins") or []]
            # A list of the masks that one is composed of, or how that one was selected which it resembles.
            of = table.get("of") or []
            waiting += (
                [(each, _MADE, f"{where}of.") for each in of]
                if isinstance(of, list)
                else [(of, _SELECTION, f"{where}of.")]
            )
        elif forms is _DOSE and table.get("earlier"):
            waiting.append((table["earlier"], _DOSE, f"{where}earlier."))
