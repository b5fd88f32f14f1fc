"""The metadata of masks and relevance, checked once, when a file is read.

Later code reads these entries and relies on their form. Other entries are kept and shown unchanged.
"""

import math
from collections.abc import Callable
from typing import Any

from stereoclinic.errors import InputError
from stereoclinic.io.reading import is_name

#: Characters of a text that is no name: a prompt, a path.
LONGEST_TEXT = 5000

_Form = tuple[str, Callable[[Any], bool]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _each(form: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(form, value))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


_TEXT: _Form = (f"text of up to {LONGEST_TEXT} characters", _is_text)
_TEXTS: _Form = ("a list of such texts", _each(_is_text))
_WHOLE: _Form = ("a whole number", _is_whole)
_NUMBER: _Form = ("a number", _is_number)
_TABLE: _Form = ("a table", _is_table)
_TABLES: _Form = ("a list of tables", _each(_is_table))
_SEEDS: _Form = ("the first and the last seed", lambda value: _each(_is_whole)(value) and len(value) == 2)
_NAMES: _Form = ("a list of names", _each(is_name))

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
        for key, (form, holds) in forms.items():
            if (value := table.get(key)) is not None and not holds(value):
                raise InputError(f"metadata {where}{key} is {value!r:.60}; expected {form}")
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
