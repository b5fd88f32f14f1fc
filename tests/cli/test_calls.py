"""What a command does, one public call does too."""

from pathlib import Path

import torch

from stereoclinic.calls.locate import LocateSettings, locate
from stereoclinic.calls.plan import PlanSettings, plan
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.pipelines import open_model, open_pipeline
from stereoclinic.sns.linear import choose
from stereoclinic.sns.mask import NeuronMask

SMALL = {"limit": 2, "seeds": 1, "steps": 4}


def words(settings: dict) -> list[object]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]


def but_for_the_time(metadata: dict) -> dict:
    return {**metadata, "created": ""}


def test_locate_from_python_is_the_command(model: Path, stereo, tmp_path: Path):
    result = stereo("locate", "--model", model, *words(SMALL), "--until", 0, "-o", tmp_path / "g.pt", "--quiet")
    assert result.exit_code == 0, result.stderr
    written = Relevance.load(tmp_path / "g.relevance.safetensors")
    settings = LocateSettings(**SMALL, until=0)
    relevance = locate(str(model), "gender", settings=settings, out=tmp_path / "again.pt")
    assert but_for_the_time(relevance.metadata) == but_for_the_time(written.metadata)
    assert all(torch.equal(getattr(relevance, name), getattr(written, name)) for name in ("relevance_sum", "lean_sum"))
    mask, again = NeuronMask.load(tmp_path / "g.pt"), NeuronMask.load(tmp_path / "again.pt")
    assert torch.equal(mask.factors, again.factors)
    assert torch.equal(choose(relevance, settings.selection()).factors, mask.factors)
    assert list(tmp_path.glob("*.shards")) == []


def test_an_open_pipeline_is_located_and_nothing_is_written(model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = locate(str(model), "gender", settings=LocateSettings(**SMALL))
    for given in (open_pipeline(str(model)), open_model(str(model))):
        relevance = locate(given, "gender", settings=LocateSettings(**SMALL))
        assert torch.equal(relevance.relevance_sum, by_name.relevance_sum)
    assert list(tmp_path.iterdir()) == []


def test_plan_from_python_is_the_command(model: Path, stereo, tmp_path: Path):
    how = {**SMALL, "mu": 0.01, "keep": 0.0, "replans": 1, "check": 0}
    result = stereo("plan", "--model", model, *words(how), "--stay", "none", "-o", tmp_path / "g.pt", "--quiet")
    assert result.exit_code == 0, result.stderr
    mask = plan(str(model), "gender", settings=PlanSettings(**how, stay=("none",)))
    written = NeuronMask.load(tmp_path / "g.pt")
    assert torch.equal(mask.factors, written.factors) and mask.groups == written.groups
    assert but_for_the_time(mask.metadata) == but_for_the_time(written.metadata)
