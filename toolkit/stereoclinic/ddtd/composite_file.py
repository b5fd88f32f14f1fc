"""A user's own composite, read from TOML; its form is shown at the head of ``composites.py``."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stereoclinic.ddtd import rules
from stereoclinic.ddtd.composites import ATTENTION, COMPOSITES, LAYER_RULES, Choice, Composite
from stereoclinic.ddtd.rules import Rule
from stereoclinic.errors import InputError
from stereoclinic.reading import read_toml

_LAYER_KINDS = ("convolution", "linear")
#: Kinds whose one rule may be replaced by the operation's own gradient, and what the rule is called.
_RULE_OR_NATIVE = {
    "silu": "gate",
    "gelu": "gate",
    "tanh": "gate",
    "sigmoid": "constant",
    "group_norm": "constant_std",
    "layer_norm": "constant_std",
    "rms_norm": "constant_std",
    "product": "halves",
    "division": "constant_divisor",
}


def read_composite(path: Path) -> Composite:
    """Read a composite; what it does not name is as in ``epsilon-cp``.

    Raises:
        InputError: the file cannot be read or does not have the form shown in ``composites.py``.
    """
    data = read_toml(path, "composite file")
    try:
        return _build(data, f"composite file {path}")
    except InputError as error:
        raise InputError(f"composite file {path}: {error}") from error


def _build(data: dict[str, Any], source: str) -> Composite:
    _only(data, ("name", "root", "modulation", "rules", "layers"), "the file")
    name = data.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"name {name!r}: expected what the composite is to be called")
    if name in COMPOSITES:
        raise InputError(f"name {name!r} is that of a built-in composite; choose another")
    by_kind, layers = data.get("rules", {}), data.get("layers", [])
    if not isinstance(by_kind, dict):
        raise InputError("rules: expected a table, [rules]")
    if not isinstance(layers, list) or not all(isinstance(entry, dict) for entry in layers):
        raise InputError("layers: expected tables, each headed [[layers]]")
    chosen = dict(COMPOSITES["epsilon-cp"].rules)
    for kind, value in by_kind.items():
        chosen |= _rules_of(kind, value)
    choices = [_choice(entry, f"layers entry {i}") for i, entry in enumerate(layers, start=1)]
    return Composite(
        name,
        chosen,
        data.get("root", "plain"),
        modulation=data.get("modulation", "constant"),
        layers=tuple(choices),
        source=source,
    )


def _rules_of(kind: str, value: Any) -> dict[str, Rule]:
    """The rules that one line of [rules] sets."""
    where = f"rules.{kind}"
    if kind in _LAYER_KINDS:
        table = {"rule": value} if isinstance(value, str) else value
        if not isinstance(table, dict):
            raise InputError(f"{where} = {value!r}: expected the name of a rule, or {{ rule = NAME, ... }}")
        return {kind: _layer_rule(table, where)}
    if kind == "attention":
        return dict(ATTENTION[_one_of(value, ATTENTION, where)])
    if kind in _RULE_OR_NATIVE:
        ours = _RULE_OR_NATIVE[kind]
        native = _one_of(value, (ours, "native"), where) == "native"
        return {kind: rules.native} if native else {kind: COMPOSITES["epsilon-cp"].rules[kind]}
    raise InputError(f"kind {kind!r} in [rules]: expected {', '.join((*_LAYER_KINDS, 'attention', *_RULE_OR_NATIVE))}")


def _choice(entry: dict[str, Any], where: str) -> Choice:
    """One of [[layers]]."""
    where_it_goes = {key: entry[key] for key in ("pattern", "depth") if key in entry}
    if not where_it_goes:
        raise InputError(f"{where}: expected a pattern, a depth = [from, to], or both")
    pattern, depth = entry.get("pattern", "*"), entry.get("depth", [0.0, 1.0])
    if not isinstance(pattern, str) or not pattern:
        raise InputError(f"{where}: pattern {pattern!r}: expected one of module paths, such as '*.ff.net.2'")
    if not isinstance(depth, list) or len(depth) != 2 or not all(map(_is_number, depth)):
        raise InputError(f"{where}: depth {depth!r}: expected [from, to] with 0 <= from <= to <= 1")
    rule = _layer_rule({key: value for key, value in entry.items() if key not in where_it_goes}, where)
    try:
        return Choice(rule, pattern, (float(depth[0]), float(depth[1])))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _layer_rule(table: dict[str, Any], where: str) -> Rule:
    """The rule that ``{ rule = NAME, PARAMETER = NUMBER }`` asks for."""
    make = LAYER_RULES[_one_of(table.get("rule"), LAYER_RULES, where)]
    parameters = list(inspect.signature(make).parameters)
    _only(table, ("rule", *parameters), where)
    for parameter in parameters:
        if not _is_number(table.get(parameter)):
            raise InputError(f"{where}: {parameter} {table.get(parameter)!r}: expected a number of 0 or more")
    try:
        return make(*(float(table[parameter]) for parameter in parameters))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _is_number(value: Any) -> bool:
    most = sys.float_info.max  # TOML's integers have no end
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def _one_of(value: Any, names: Iterable[str], where: str) -> str:
    if not isinstance(value, str) or value not in names:
        raise InputError(f"{where}: rule {value!r}: expected one of {', '.join(names)}")
    return value


def _only(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in table if key not in keys]:
        raise InputError(f"{where} has an unknown key {unknown[0]!r}; expected {', '.join(keys)}")
