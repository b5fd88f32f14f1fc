"""`evaluate`, `compare`, `doctor` and `apply` from Python are their commands."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.cli.test_calls import words
from tests.cli.test_resume import figures

from stereoclinic import (
    ApplySettings,
    DoctorSettings,
    EvaluateSettings,
    InputError,
    NeuronMask,
    apply,
    compare,
    doctor,
    evaluate,
    open_model,
)
from stereoclinic.evaluation.limits import exceeded, parse_limit
from stereoclinic.evaluation.results import Results

SMALL = {"limit": 2, "images": 2, "group_images": 1, "steps": 2, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def benched(model: Path, located: Path, stereo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    more = ("--baseline", "prompt", "--reference", "planted", "--guidance", 1, "--guidance", 2, "--quiet")
    result = stereo("bench", "--model", model, "--mask", located, *words(SMALL), *more, "-o", out)
    assert result.exit_code == 0, result.stderr
    return out


def written(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_evaluate_is_the_command(model: Path, located: Path, benched: Path, tmp_path: Path):
    settings = EvaluateSettings(**SMALL, baselines=("prompt",), reference="planted", guidance=(1.0, 2.0))
    results = evaluate(str(model), [located], settings=settings, out=tmp_path / "out")
    mine, theirs = written(tmp_path / "out"), written(benched)
    assert figures(mine) == figures(theirs)
    assert theirs["provenance"].pop("command").startswith("stereo")
    assert {**mine["provenance"], "created": ""} == {**theirs["provenance"], "created": ""}
    assert results.data == mine and "parity gap" in results.verdict
    assert [each.guidance for each in results.experiments] == [1, 2]
    names = ("before_after.png", "report.html", "images/metadata.jsonl")
    assert all((tmp_path / "out" / name).is_file() for name in names)


def test_an_open_model_and_a_mask_in_memory_give_the_same_figures(
    model: Path, located: Path, benched: Path, tmp_path: Path
):
    settings = EvaluateSettings(**SMALL, baselines=("prompt",), reference="planted", guidance=(1.0, 2.0))
    masks = {"gender": NeuronMask.load(located)}
    results = evaluate(open_model(model), masks, settings=settings, out=tmp_path / "out")
    assert figures(written(tmp_path / "out")) == figures(written(benched))
    assert results.provenance.masks["gender"].file is None
    assert "relevance" not in results.data["provenance"]  # there is no file that it could be next to


def test_compare_takes_files_and_results(benched: Path, stereo):
    found = compare(benched, Results.load(benched))
    printed = json.loads(stereo("compare", benched, benched / "results.json", "--json").stdout)
    del printed["files"]
    assert json.loads(json.dumps(found)) == printed


def test_a_limit_is_exceeded_by_what_is_above_it_or_was_not_measured(benched: Path):
    experiments = written(benched)["experiments"]
    gap = experiments[0]["arms"]["gender"]["parity_gap"]["estimate"]
    assert exceeded(experiments, "gender", [parse_limit(f"parity-gap={gap + 1}")]) == []
    lines = exceeded(experiments, "gender", [parse_limit("parity_gap=-1")])
    assert len(lines) == 2 and lines[0].startswith("parity_gap of gender at guidance 1 is ")
    experiments[0]["arms"]["gender"]["parity_gap"] = None
    assert exceeded(experiments[:1], "gender", [("parity_gap", 9.0)]) == [
        "parity_gap of gender at guidance 1 could not be measured"
    ]
    for wrong in ("nothing=1", "parity_gap", "parity_gap=low"):
        with pytest.raises(InputError, match="--fail-above"):
            parse_limit(wrong)


def test_doctor_is_the_command(model: Path, stereo):
    found = asdict(doctor(str(model), DoctorSettings(accelerator="cpu")))
    printed = json.loads(stereo("doctor", "--model", model, "--accelerator", "cpu", "--json").stdout)
    for data in (found, printed):
        assert data.pop("time")["why"] == ""
    assert json.loads(json.dumps(found)) == printed and found["supported"]


def test_apply_is_the_command(model: Path, located: Path, stereo, tmp_path: Path):
    settings = ApplySettings(images=1, steps=2, accelerator="cpu")
    entries = apply(["a photo of a doctor"], [located], str(model), settings, out=tmp_path / "mine")
    arguments = ("apply", "a photo of a doctor", "--model", model, "--mask", located, "-n", 1, "--steps", 2, "--json")
    result = stereo(*arguments, "--accelerator", "cpu", "--quiet", "-o", tmp_path / "theirs")
    printed = json.loads(result.stdout)["images"]
    for mine, theirs in zip(entries, printed, strict=True):
        one, other = Path(mine.pop("file_name")), Path(theirs.pop("file_name"))
        assert mine == theirs and one.name == other.name and one.read_bytes() == other.read_bytes()
