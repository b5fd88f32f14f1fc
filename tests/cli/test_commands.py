"""What commands share: a dry run writes nothing, a config may stand in for flags, --force, devices."""

from pathlib import Path

import pytest
import torch

from stereoclinic.runtime.devices import device_of
from stereoclinic.sns.mask import NeuronMask


def test_a_config_may_give_one_value_where_several_are_allowed(model, located, stereo, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(f"model: {model}\nmask: {located}\nguidance: 2\nlimit: 1\ndry-run: true\n")
    result = stereo("bench", "--config", tmp_path / "run.yaml", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "1 mask(s)" in result.stdout
    assert "guidance 2" in result.stdout


@pytest.mark.parametrize(("there", "chosen"), [(True, "mps"), (False, "cpu")])
def test_float64_is_not_asked_of_mps(monkeypatch, there: bool, chosen: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    assert device_of("auto") == chosen
    assert device_of("auto", float64=True) == "cpu"


def test_force_accepts_other_weights(model, located, stereo, tmp_path: Path):
    mask = NeuronMask.load(located)
    metadata = {**mask.metadata, "unet_weights": "0" * 64}
    NeuronMask(mask.sites, mask.bin_edges, mask.factors, metadata=metadata).save(tmp_path / "m.pt")
    shared = ("--model", model, "--mask", tmp_path / "m.pt", "--steps", 1, "--force", "--quiet", "--json")
    bench = ("bench", "--limit", 1, "--images", 2, "--group-images", 1, "--out", tmp_path / "o")
    assert stereo(*bench, *shared).exit_code == 0
    assert stereo("apply", "a photo of a doctor", "-n", 1, "--out", tmp_path / "a", *shared).exit_code == 0


@pytest.mark.parametrize("command", [("locate",), ("bench",), ("apply", "a photo of a doctor")])
def test_a_dry_run_writes_nothing(model, located, stereo, tmp_path: Path, monkeypatch, command: tuple):
    monkeypatch.chdir(tmp_path)
    mask = () if command == ("locate",) else ("--mask", located)
    bins = ("--every", 1, "--bins", 2) if command == ("locate",) else ()
    result = stereo(*command, "--model", model, *mask, *bins, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("would ")
    assert list(tmp_path.iterdir()) == []
