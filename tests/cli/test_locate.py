"""`stereo locate` on a tiny model: what it prints, what it writes, and that the two agree."""

import json
from pathlib import Path

import pytest
import torch

from stereo_cli import tables
from stereoclinic.ddtd.relevance import STATES, Relevance
from stereoclinic.report.summary import lean_summary, mask_summary
from stereoclinic.sns.mask import NeuronMask


def test_locate_writes_a_mask_and_its_relevance(located):
    mask = NeuronMask.load(located)
    relevance = Relevance.load(located.with_name("gender.relevance.safetensors"))
    assert mask.sites == relevance.sites
    assert mask.metadata["axis"] == "gender"
    assert mask.metadata["seeds"] == [0, 1]
    assert relevance.labels == ["doctor", "nurse", "teacher"]
    assert relevance.count.sum() == 3 * 2 * 2  # prompts x seeds x steps
    assert sorted(path.name for path in located.parent.iterdir()) == ["gender.pt", "gender.relevance.safetensors"]
    # What the faithfulness and mitigation benchmarks chose, and the README's figures were measured with.
    plan = mask.metadata["selection"]
    assert (relevance.metadata["composite"], relevance.metadata["root"]) == ("gradient", "plain")
    assert (plan["method"], plan["mu"], plan["overshoot"], plan["window"]) == ("plan", 1.0, 0.0, [1000.0, 600.0])
    assert (plan["root"], plan["per_bin"]) == ("zero", False)


def test_locate_prints_what_it_wrote(model, stereo, located, tmp_path: Path):
    """The same run again: as tables, and as JSON with the same figures."""
    arguments = ("locate", "--model", model, "--limit", 3, "--seeds", 2, "--every", 1, "--bins", 2)
    result = stereo(*arguments, "-o", tmp_path / "a.safetensors")
    assert "Lean toward female" in result.stdout
    for label in ("doctor", "nurse", "teacher"):
        assert label in result.stdout
    data = json.loads(stereo(*arguments, "-o", tmp_path / "b.pt", "--json", "--quiet").stdout)
    relevance = Relevance.load(located.with_name("gender.relevance.safetensors"))
    expected = lean_summary(relevance)
    assert [row["label"] for row in data["lean"]["rows"]] == relevance.labels
    for row, other in zip(data["lean"]["rows"], expected["rows"], strict=True):
        assert row["mean"]["lean"] == pytest.approx(other["mean"]["lean"], rel=1e-4)
    assert data["files"]["mask"] == str(tmp_path / "b.pt")
    assert data["mask"]["total"]["neurons"] == relevance.relevance_sum.shape[-1]
    a, b = NeuronMask.load(tmp_path / "a.safetensors"), NeuronMask.load(tmp_path / "b.pt")
    assert torch.equal(a.factors, b.factors)


def test_top_k_and_a_users_config(model, stereo, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\nlimit: 2\nseeds: 2\nevery: 1\nbins: 1\nselect: top-k\ntop: 5\njson: true\n"
    )
    data = json.loads(stereo("locate", "--config", tmp_path / "run.yaml", "--top", 3, "-o", tmp_path / "m.pt").stdout)
    assert data["mask"]["total"]["damped"] == 3  # the flag wins over the file


def test_summaries_add_up(located):
    relevance = Relevance.load(located.with_name("gender.relevance.safetensors"))
    leans = lean_summary(relevance)
    for p, row in enumerate(leans["rows"]):
        values = [cell["lean"] for cell in row["bins"]]
        assert row["mean"]["lean"] == pytest.approx(sum(values) / len(values))
        assert values == pytest.approx(relevance.lean()[p, :, 0].tolist())
        assert sum(cell["n"] for cell in row["bins"]) == row["mean"]["n"] == 4
    json.dumps([leans, mask_summary(NeuronMask.load(located))], allow_nan=False)


def test_bins_that_nothing_fell_into_are_none(located):
    relevance = Relevance.load(located.with_name("gender.relevance.safetensors"))
    for name in STATES:
        tensor = getattr(relevance, name)
        axis = tensor.shape.index(2) if name == "stereotype_sq" else 1
        tensor.select(axis, 1).zero_()
    leans = lean_summary(relevance)
    assert all(row["bins"][1] == {"lean": None, "stderr": None, "n": 0} for row in leans["rows"])
    assert leans["mean_absolute"]["bins"][1] is None
    json.dumps(leans, allow_nan=False)
    tables.lean_table(leans)
