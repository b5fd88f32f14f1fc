"""`stereo bench` writes a report beside its results, and `stereo compare` says what differs between two of them."""

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from stereoclinic.evaluation.compare import compare_results
from stereoclinic.evaluation.results import Results
from stereoclinic.evaluation.verdict import verdicts

SMALL = ("--limit", 2, "--images", 3, "--group-images", 1, "--steps", 1, "--quiet")


@pytest.fixture(scope="module")
def benches(model, located, stereo, tmp_path_factory) -> tuple[Path, Path]:
    """Two small runs: the mask at full strength, with its relevance, and at half of it, in a folder with a bracket and
    with no relevance beside."""
    folder = tmp_path_factory.mktemp("benches")
    whole, half, alone = folder / "whole", folder / "half[b]", folder / "gender.pt"
    alone.write_bytes(located.read_bytes())
    common = ("bench", "--model", model, *SMALL, "--seed", 50)
    relevance = located.with_name("gender.relevance.safetensors")
    result = stereo(*common, "--mask", located, "--relevance", relevance, "-o", whole)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"wrote {whole / 'report.html'}, {whole / 'results.json'},")
    result = stereo(*common, "--mask", alone, "--strength", 0.5, "--guidance", 1, "--guidance", 2, "-o", half)
    assert result.exit_code == 0, result.stderr
    return whole, half


def test_results_are_of_the_published_schema(benches):
    schema = Results.model_json_schema()
    for folder in benches:
        data = json.loads((folder / "results.json").read_text())
        Draft202012Validator(schema).validate(data)
        assert Results.load(folder).data == data


def test_the_report_is_of_the_run(benches):
    for folder, with_leans in zip(benches, (True, False), strict=True):
        data = json.loads((folder / "results.json").read_text())
        report = (folder / "report.html").read_text(encoding="utf-8")
        for results in data["experiments"]:
            for each in verdicts(results):
                assert each.sentence.replace("<", "&lt;").replace("'", "&#39;") in report
        assert data["provenance"]["unet_weights"] in report
        pictures = len(data["experiments"]) * 2 * 2 * 3  # prompts x arms x seeds
        assert report.count('src="data:image/png;base64,') == pictures
        assert ("--relevance FILE" in report) != with_leans
        assert "neurons damped, chosen by a linear plan from relevance" in report
        assert len(report) < 3_000_000


def test_json_is_the_comparison(benches, stereo):
    a, b = benches
    data = json.loads(stereo("compare", a / "results.json", b, "--json").stdout)
    assert data.pop("files") == {"a": str(a / "results.json"), "b": str(b)}
    assert data == json.loads(json.dumps(compare_results(Results.load(a).data, Results.load(b).data)))


def test_tables_say_what_the_comparison_holds(benches, stereo):
    a, b = benches
    result = stereo("compare", a, b)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"A: {a}", f"B: {b}"]
    notes = [line for line in lines if line.startswith("note: ")]
    assert notes == ["note: strength of the masks: 1.0 in A, 0.5 in B", "note: guidance 2 is in B only"]
    found = compare_results(Results.load(a).data, Results.load(b).data)
    (experiment,) = found["experiments"]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if line.strip().startswith("parity gap ")]
    assert len(rows) == len(experiment["arms"])
    for arm, row in zip(experiment["arms"], rows, strict=True):
        assert f"{arm['a']}: guidance 1" in result.stdout
        gap = next(each for each in arm["figures"] if each["figure"] == "parity_gap")
        assert row[1].startswith(f"{gap['a']['estimate']:.2f} [") and row[2].startswith(f"{gap['b']['estimate']:.2f} [")
        assert row[-1] == gap["verdict"]
    assert max(map(len, lines[2:])) <= 110
    assert "differ significantly: B is better in" in lines[-2]


def test_what_cannot_be_compared_is_one_line(benches, stereo, tmp_path: Path):
    a, _ = benches
    other = json.loads((a / "results.json").read_text())
    for results in other["experiments"]:
        results["axis"] = "skin"
    (tmp_path / "results.json").write_text(json.dumps(other))
    for path, says in ((tmp_path, "axis gender in A, skin in B"), (tmp_path / "none.json", "cannot be read")):
        result = stereo("compare", a, path)
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert says in line


def test_relevance_of_another_axis_is_refused_before_anything_is_drawn(model, located, stereo, tmp_path: Path):
    relevance = located.with_name("gender.relevance.safetensors")
    result = stereo(
        "bench", "--model", model, "--axis", "skin", *SMALL, "--relevance", relevance, "-o", tmp_path / "out"
    )
    assert result.exit_code == 2
    assert "was located for female, male, not for axis skin" in result.stderr
    assert not (tmp_path / "out").exists()
