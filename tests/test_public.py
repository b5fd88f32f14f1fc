"""The public names: all there, and none of them costs anything before it is used."""

import subprocess
import sys

import pytest

import stereoclinic


@pytest.mark.parametrize("name", stereoclinic.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(stereoclinic, name).__name__ == name
    assert name in dir(stereoclinic)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="attribute cure"):
        stereoclinic.cure  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import stereoclinic, sys; print(sorted({'torch', 'diffusers', 'lightning', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
