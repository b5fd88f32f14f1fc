"""Settings that are given as texts, such as KEY=VALUE, and written as texts again."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stereoclinic.errors import InputError


def call_options(given: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Options of the pipeline's own call, from KEY=VALUE texts; a mapping stays as it is.

    A value is read as JSON where it is JSON, and as text otherwise.

    Raises:
        InputError: A text is not of the form KEY=VALUE, or a key is given twice.
    """
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    found: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or not name.isidentifier():
            raise InputError(f"--call {text!r}: expected KEY=VALUE, such as true_cfg_scale=4")
        if name in found:
            raise InputError(f"--call {text!r}: {name} is given twice")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(text: str) -> None:
    """NaN and Infinity are not JSON."""
    raise ValueError(text)


def call_texts(call: Mapping[str, Any]) -> list[str]:
    """Options of the pipeline's call as --call takes them."""
    return [
        f"{name}={value if isinstance(value, str) and _value(value) == value else json.dumps(value)}"
        for name, value in sorted(call.items())
    ]


def group_shares(given: Sequence[str | Mapping[str, float]] | Mapping[str, float] | None) -> list[dict[str, float]]:
    """Shares of groups, from GROUP=SHARE,GROUP=SHARE texts: one mapping for each axis; mappings stay as they are.

    Raises:
        InputError: A text is not of that form, or names a group twice.
    """
    found: list[dict[str, float]] = []
    for each in [given] if isinstance(given, Mapping) else given or []:
        if isinstance(each, Mapping):
            found.append(dict(each))
            continue
        shares: dict[str, float] = {}
        for part in each.split(","):
            group, _, value = part.partition("=")
            try:
                share = float(value)
            except ValueError:
                raise InputError(f"--shares {each!r}: expected GROUP=SHARE, such as female=0.5,male=0.5") from None
            if group.strip() in shares:
                raise InputError(f"--shares {each!r}: {group.strip()} is given twice")
            shares[group.strip()] = share
        found.append(shares)
    return found
