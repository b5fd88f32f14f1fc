"""The examples in docstrings are true, wherever they stand."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import stereoclinic

ROOT = Path(stereoclinic.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_there_are_examples() -> None:
    assert "stereoclinic.statistics.shares" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name: str) -> None:
    found = doctest.testmod(import_module(name))
    assert found.attempted > 0 and found.failed == 0
