"""The metadata of masks and relevance, checked once, when a file is read.

Later code reads these entries and relies on their form. Other entries are kept and shown unchanged.

Data from a file, checked against a pydantic model; a mistake is one clear line.
"""

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from stereoclinic.errors import InputError
from stereoclinic.io.reading import is_name

F = TypeVar("F", bound="Form")


class Form(BaseModel):
    """A table of a file: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def parse(form: type[F], data: Any, what: str) -> F:
    """The table that plain data holds.

    Args:
        form: Its fields.
        data: As a parser returned it.
        what: Its name in errors, such as "composite file mine.toml".

    Raises:
        InputError: Names the first entry that is wrong, its value and what was expected.
    """
    try:
        return form.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
    place = [str(part + 1) if isinstance(part, int) else str(part) for part in first["loc"]]  # entries count from 1
    where, message = ".".join(place), first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = f"; the keys are {', '.join(form.model_fields)}" if len(place) == 1 else ""
        raise InputError(f"{what}: unknown key {where!r}{known}")
    if first["type"] == "missing":
        raise InputError(f"{what}: {where} is missing")
    if first["type"] == "value_error":
        raise InputError(f"{what}: {where and where + ': '}{message}")
    expected = "expected a table" if first["type"] == "model_type" else message.replace("Input should be", "expected")
    raise InputError(f"{what}: {where} = {first['input']!r:.60}: {expected}")


#: Characters of a text that is not a name: a prompt, a path.
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
    "composite": _TEXT, "composite_choice": _TABLE, "root": _TEXT, "target": _TEXT, "steps": _WHOLE, "every": _WHOLE,
    "guidance": _NUMBER, "selection": _TABLE, "adjusted": _TABLES, "dose": _TABLE,
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
