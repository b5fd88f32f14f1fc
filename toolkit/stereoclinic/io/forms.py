"""Data from a file, checked against a pydantic model; a mistake is one clear line."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stereoclinic.errors import InputError

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
