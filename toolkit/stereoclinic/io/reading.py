"""Text, TOML and JSON from strangers, read whole or refused.

Sizes are bounded before parsing, and so is memory. The result is plain data that every later step can hash, print and
write: no deeper than `DEEPEST`, whole numbers of 64 bits, text without control characters.
"""

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from stereoclinic.errors import InputError, first_line

#: Bytes of a text file, or of the JSON in a file of tensors. Tables of results are the largest there are.
MOST = 16 * 2**20
#: The same for TOML, and dots in one line: the parser takes time with the square of a dotted key, 95 s for 64 KiB.
MOST_TOML, MOST_DOTS = 2**18, 100
DEEPEST = 50
#: Characters of the name of an axis or a group, groups of an axis, timestep bins of a mask or of relevance.
LONGEST_NAME, MOST_GROUPS, MOST_BINS = 200, 100, 10_000
#: Layers of a model of one kind.
MOST_LAYERS = 1000

_LAYERS = re.compile("layers|depth|num_blocks|num_stages")
#: Control characters except tabs and ends of lines, and halves of characters.
ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def read_text(path: str | Path, what: str, most: int = MOST) -> str:
    """A file's text.

    Args:
        path: Where it is.
        what: Its name in errors, such as "axis file".
        most: Bytes that it may have.

    Raises:
        InputError: It cannot be read, is no UTF-8, or is larger.
    """
    try:
        with Path(path).open("rb") as file:  # a pipe has no size
            content = file.read(most + 1)
        if len(content) > most:
            raise InputError(f"{what} {path}: larger than {most:,} bytes, the most that such a file may have")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} {path} cannot be read: it is not text in UTF-8") from error


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """A TOML file's table.

    Raises:
        InputError: As `read_text`, or it is no TOML.
    """
    text = read_text(path, what, MOST_TOML)
    try:
        if max(line.count(".") for line in text.split("\n")) > MOST_DOTS:
            raise ValueError(f"a line has more than {MOST_DOTS} dots")
        data = tomllib.loads(text)
        check_plain(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {path}: {_reason(error)}") from error
    return data


def read_json(path: str | Path, what: str) -> Any:
    """A JSON file's content; NaN and infinity, which JSON has not, are refused.

    Raises:
        InputError: As `read_text`, or it is no JSON.
    """
    text = read_text(path, what)
    try:
        data = json.loads(text, parse_constant=_no_number)
        check_plain(data, finite=True)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} cannot be read: {_reason(error)}") from error
    return data


def check_plain(data: Any, finite: bool = False) -> None:
    """Refuse data that a later step could not handle.

    Args:
        data: As a parser returned it.
        finite: Refuse infinite numbers as well, such as `1e999`.

    Raises:
        ValueError: It is nested too deep, or holds a number or text that is not plain.
    """
    waiting = [data]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for each in waiting:
            if isinstance(each, dict):
                below += each.keys()
                below += each.values()
            elif isinstance(each, list):
                below += each
            elif isinstance(each, str):
                if found := ODD.search(each):
                    raise ValueError(f"text holds the control character {found[0]!r}")
            elif isinstance(each, int):
                if not -(2**63) <= each < 2**64:
                    raise ValueError("a number does not fit into 64 bits")
            elif finite and isinstance(each, float) and not math.isfinite(each):
                raise ValueError("a number is not finite")
        if not below:
            return
        waiting = below
    raise ValueError(f"nested deeper than {DEEPEST}")


def is_name(value: Any) -> bool:
    """Whether something can be the name of an axis or of a group, or the words that ask for one."""
    return isinstance(value, str) and 0 < len(value.strip()) <= len(value) <= LONGEST_NAME and value.isprintable()


def check_layers(path: Path, what: str) -> None:
    """Refuse a configuration that asks for more layers than any model has, which libraries would make without end.

    Args:
        path: Of a config.json. A file that cannot be read is left to the library to refuse.
        what: Its model, in errors.

    Raises:
        InputError: It asks for more.
    """
    try:
        waiting = [json.loads(path.read_bytes())] if path.is_file() and path.stat().st_size <= MOST else []
    except (OSError, ValueError, RecursionError):
        return
    for table in filter(lambda each: isinstance(each, dict), waiting):
        for key, value in table.items():
            if isinstance(value, dict):
                waiting.append(value)
            numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
            if _LAYERS.search(key) and any(number > MOST_LAYERS for number in numbers):
                raise InputError(f"{what}: {path} asks for {key} {value!r:.40}; models have up to {MOST_LAYERS}")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested deeper than {DEEPEST}"
    return first_line(error)
