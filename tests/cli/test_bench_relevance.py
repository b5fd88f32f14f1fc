"""Relevance next to a mask gives its lean curves unasked, if it is of the judged model and axis; else nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stereoclinic.calls.inputs import relevance_near
from stereoclinic.ddtd.relevance import Relevance

SMALL = ("--limit", 1, "--images", 2, "--group-images", 0, "--steps", 1, "--quiet", "--seed", 50)
GROUPS = ("female", "male")


@pytest.fixture(scope="module")
def relevance(located: Path) -> Relevance:
    return Relevance.load(located.with_name("gender.relevance.safetensors"))


def digests(relevance: Relevance) -> dict[str, str]:
    return {name: relevance.metadata[name] for name in ("unet_shapes", "unet_weights")}


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a-allocated.pt", "a-balanced.safetensors"])
def test_it_is_found_by_the_names_that_locate_and_plan_give(relevance, tmp_path: Path, name: str):
    relevance.save(tmp_path / "a.relevance.safetensors")
    found = relevance_near(tmp_path / name, GROUPS, digests(relevance))
    assert found is not None and found[0] == tmp_path / "a.relevance.safetensors"
    assert found[1].groups == GROUPS


def test_one_of_the_masks_own_name_comes_first(relevance, tmp_path: Path):
    for stem in ("a", "a-allocated"):
        relevance.save(tmp_path / f"{stem}.relevance.safetensors")
    found = relevance_near(tmp_path / "a-allocated.pt", GROUPS, digests(relevance))
    assert found is not None and found[0].name == "a-allocated.relevance.safetensors"


@pytest.mark.parametrize("lacks", ["unet_shapes", "unet_weights"])
def test_that_of_another_model_or_of_none_it_names_is_left_out(relevance, tmp_path: Path, lacks: str):
    path, model = tmp_path / "a.relevance.safetensors", digests(relevance)
    for metadata in (
        {**relevance.metadata, lacks: "0" * 64},
        {key: value for key, value in relevance.metadata.items() if key != lacks},
    ):
        replace(relevance, metadata=metadata).save(path)
        assert relevance_near(tmp_path / "a.pt", GROUPS, model) is None


def test_that_of_another_axis_or_broken_is_left_out(relevance, tmp_path: Path):
    path, model = tmp_path / "a.relevance.safetensors", digests(relevance)
    assert relevance_near(tmp_path / "a.pt", GROUPS, model) is None  # none is there
    relevance.save(path)
    assert relevance_near(tmp_path / "a.pt", ("old", "young"), model) is None
    assert relevance_near(tmp_path / "b.pt", GROUPS, model) is None
    path.write_bytes(path.read_bytes()[:100])
    assert relevance_near(tmp_path / "a.pt", GROUPS, model) is None


def test_bench_draws_its_lean_curves_and_says_what_the_reader_cannot_tell(model, located, stereo, tmp_path: Path):
    arguments = ("bench", "--model", model, "--mask", located, *SMALL)
    result = stereo(*arguments, "-o", tmp_path / "beside")
    assert result.exit_code == 0, result.stderr
    file = located.with_name("gender.relevance.safetensors")
    assert stereo(*arguments, "-o", tmp_path / "given", "--relevance", file).exit_code == 0
    leans = []
    for folder in ("beside", "given"):
        assert json.loads((tmp_path / folder / "results.json").read_text())["provenance"]["relevance"] == str(file)
        page = (tmp_path / folder / "report.html").read_text()
        leans.append(page[page.index('<section id="lean">') : page.index('<section id="provenance">')])
        assert page.count("It was trained on flat cartoon portraits") == 2  # to be seen, and in the JSON
    assert leans[0] == leans[1] and 'class="curve"' in leans[0]
    (heading,) = [i for i, line in enumerate(result.stdout.splitlines()) if line.startswith("Limits of the reader")]
    assert "flat cartoon portraits" in result.stdout.splitlines()[heading + 1]
    assert heading > result.stdout[: result.stdout.index("Cost: gender")].count("\n")


def test_bench_leaves_that_of_another_model_out_without_a_word(model, located, relevance, stereo, tmp_path: Path):
    (tmp_path / "gender.pt").write_bytes(located.read_bytes())
    other = replace(relevance, metadata={**relevance.metadata, "unet_weights": "0" * 64})
    other.save(tmp_path / "gender.relevance.safetensors")
    result = stereo("bench", "--model", model, "--mask", tmp_path / "gender.pt", *SMALL, "-o", tmp_path / "out")
    assert result.exit_code == 0 and result.stderr == ""
    assert "--relevance FILE" in (tmp_path / "out" / "report.html").read_text()
    assert "relevance" not in json.loads((tmp_path / "out" / "results.json").read_text())["provenance"]
