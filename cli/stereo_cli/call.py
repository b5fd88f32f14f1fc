"""Options of the pipeline's own call: read from --call, --height and --width, and written as they were given."""

import json
from collections.abc import Mapping
from typing import Any


def call_from(
    given: list[str] | None, height: int | None, width: int | None, made: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The options of the pipeline's own call that --call, --height and --width give.

    Args:
        given: KEY=VALUE each; a value is read as JSON where it is JSON, and as text otherwise.
        height: Of the pictures.
        width: Of the pictures.
        made: Metadata of a file that was made with options of its own; they hold where no other is given.

    Raises:
        InputError: One is not of the form KEY=VALUE or is given twice, height or width is given alone, or the file's
            own are no table.
    """
    from stereoclinic.errors import InputError

    found: dict[str, Any] = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    for text in given or []:
        name, separator, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or not name.isidentifier():
            raise InputError(f"--call {text!r}: expected KEY=VALUE, such as true_cfg_scale=4")
        if name in found:
            raise InputError(f"--call {text!r}: {name} is given twice")
        found[name] = _value(value)
    own = {} if made is None else made.get("call", {})
    if not isinstance(own, dict):
        raise InputError(f"the file was made with the call options {own!r}, which are no table; make it again")
    whole = {**own, **found}
    if len(sides := [name for name in ("height", "width") if name in whole]) == 1:
        # Some pipelines would take neither then, and say nothing.
        raise InputError(f"height and width go together, and {sides[0]} alone is given; give both")
    return whole


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(text: str) -> None:
    """NaN and Infinity are not JSON."""
    raise ValueError(text)


def call_words(call: Mapping[str, Any]) -> list[str]:
    """Options of the pipeline's call as --call takes them."""
    return [
        f"{name}={value if isinstance(value, str) and _value(value) == value else json.dumps(value)}"
        for name, value in sorted(call.items())
    ]
