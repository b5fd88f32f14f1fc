"""`stereo diff`: what it prints is what was compared, by the kinds and timesteps of the files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.io.tensors import save_tensors
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.diff import compare
from stereoclinic.sns.mask import NeuronMask


@pytest.fixture(scope="module")
def file(located: Path) -> Path:
    return located.with_name("gender.relevance.safetensors")


@pytest.fixture(scope="module")
def other(file: Path, stereo, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("other") / "sparse[1].pt"
    assert stereo("mask", file, "--at-most", 40, "--mu", 3, "--until", 400, "-o", path).exit_code == 0
    return path


def test_json_is_the_comparison_by_kinds_of_layer(located, other, stereo):
    data = json.loads(stereo("diff", located, other, "--json").stdout)
    found = compare(NeuronMask.load(located), NeuronMask.load(other))
    assert data["files"] == {"a": str(located), "b": str(other)}
    for key in ("what", "made", "sites", "all", "bins"):
        assert data[key] == json.loads(json.dumps(found[key])), key
    kinds = [row["kind"] for row in data["kinds"]]
    assert sorted(kinds) == ["convolution", "cross-attention", "feed-forward", "self-attention"]
    assert sum(row["neurons"] for row in data["kinds"]) == data["all"]["neurons"]


def test_tables_say_what_the_comparison_holds(located, other, stereo):
    result = stereo("diff", located, other)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"A: {located}\nB: {other}\n")
    lines = result.stdout.splitlines()
    assert max(map(len, lines[2:])) <= 110
    found = compare(NeuronMask.load(located), NeuronMask.load(other))
    sizes, common = (line.split() for line in lines if line.strip().startswith("all "))
    whole = found["all"]
    assert sizes[1:4] == [str(whole["neurons"]), str(whole["a"]["set"]), str(whole["b"]["set"])]
    assert common[1:3] == [f"{whole['overlap'][key]:.2f}" for key in ("jaccard", "chance")]
    assert common[7:9] == [f"{whole['spearman']['value']:.2f}", f"±{whole['spearman']['noise']:.2f}"]
    made = {line.split()[0]: line.split()[1:] for line in lines if line.strip().startswith("selection.")}
    assert made["selection.mu"] == ["1.0", "3.0"]
    assert made["selection.at_most"] == ["-", "40"]
    for bounds in ("1000-600", "600-500", "500-400", "400-0"):  # two halves, cut at 600 by one and at 400 by the other
        assert f"t {bounds} " in result.stdout


def test_relevance(file, stereo, tmp_path: Path):
    relevance = Relevance.load(file)
    changed = replace(relevance, stereotype_sum=relevance.stereotype_sum.flip(-1), metadata={"axis": "gender"})
    changed.count[:, 1] = 0
    changed.save(tmp_path / "changed.safetensors")
    result = stereo("diff", file, tmp_path / "changed.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "How much relevance each holds" in result.stdout
    assert "neurons above 0" in " ".join(result.stdout.split())
    data = json.loads(stereo("diff", file, tmp_path / "changed.safetensors", "--json").stdout)
    assert data["what"] == "relevance"
    assert "neurons" not in data["bins"][1]


def test_a_file_beside_itself(located, stereo):
    result = stereo("diff", located, located)
    assert "Made alike" in result.stdout
    assert result.exit_code == 0


def test_masks_of_other_models_are_said_to_be_so(located, stereo, tmp_path: Path):
    mask = NeuronMask.load(located)
    sites = [Site(f"elsewhere.{site.name}", site.kind, site.width) for site in mask.sites]
    replace(mask, sites=sites).save(tmp_path / "other.pt")
    result = stereo("diff", located, tmp_path / "other.pt")
    assert result.exit_code == 0
    assert "they belong to different models" in result.stdout
    assert json.loads(stereo("diff", located, tmp_path / "other.pt", "--json").stdout)["all"] is None
    replace(mask, sites=[sites[0], *mask.sites[1:]]).save(tmp_path / "other.pt")
    result = stereo("diff", located, tmp_path / "other.pt")
    assert "2 layers that only one file has are left out" in " ".join(result.stdout.split())


def test_allocating_masks_have_a_row_for_each_group(located, stereo, tmp_path: Path):
    mask = NeuronMask.load(located)
    factors = torch.stack([mask.factors, 1 - 0.5 * mask.damping])
    replace(mask, factors=factors, groups=("female", "male")).save(tmp_path / "a.pt")
    result = stereo("diff", tmp_path / "a.pt", tmp_path / "a.pt")
    assert result.exit_code == 0, result.stderr
    for group in ("female", "male"):
        assert result.stdout.count(f"for {group}") == 2


def test_bad_input(located, file, stereo, tmp_path: Path):
    save_tensors(tmp_path / "w.pt", "weights", 1, {"x": torch.ones(2)}, {})
    (tmp_path / "cut.pt").write_bytes(located.read_bytes()[:1000])
    for arguments, says in (
        ((located, file), f"{located} is a mask and {file} is relevance; give two masks, or two relevance files"),
        ((file, located), f"{file} is relevance and {located} is a mask"),
        ((located, tmp_path / "none.pt"), "No such file"),
        ((located, tmp_path / "w.pt"), "is a weights file; expected a mask or relevance"),
        ((located, tmp_path / "cut.pt"), "truncated"),
        ((located, tmp_path), "is a folder"),
    ):
        result = stereo("diff", *arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert says in line
