"""Whatever a file holds, what reads it either reads it or says in one line why not: `InputError`, and nothing else.

A few cases of each kind; `nox -s fuzz` runs them all.
"""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.run import check_whole, run_case
from tests.fuzz.samples import KINDS

from stereoclinic.io.text import slug
from stereoclinic.pipelines.sites import Site

#: Cases of a day: of kinds that take long to read, such as models, a few.
FEW = {name: 60 if kind.cases > 300 else 6 for name, kind in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_damaged_or_hold_something_else(kind: str):
    check_whole(kind)
    failures = [line for number in range(FEW[kind]) for line in run_case(kind, number).failures]
    assert not failures, "\n".join(failures)


def test_the_whole_run_is_of_twenty_thousand_cases():
    assert sum(kind.cases for kind in KINDS.values()) >= 20_000


@pytest.mark.parametrize(
    ("text", "name"),
    [("gender-test", "gender-tests"), ("train validation", "trains-validations"), ("contest 2", "contest-2")],
)
def test_words_that_name_a_split_of_a_data_set_are_changed(text: str, name: str):
    assert slug(text) == name


def test_file_names_are_short_however_many_such_words_there_are():
    assert len(slug("val " * 40)) <= 60


@given(st.text())
def test_file_names_made_from_texts_stay_in_their_folder(text: str):
    name = slug(text)
    assert re.fullmatch(r"[a-z0-9-]{1,60}", name)
    assert (Path("/folder") / f"{name}-1.png").parent == Path("/folder")
    assert Site(name, "ff", 1).name == name
