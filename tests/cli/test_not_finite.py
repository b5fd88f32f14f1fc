"""Values that are not finite: the model is named and nothing is reported of it; as JSON they are null."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stereo_cli import terminal


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """The tiny model, with a weight that is not a number."""
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.bias"].fill_(torch.nan)
    save_file(state, weights)
    return folder


def test_a_model_whose_pictures_are_not_finite_is_not_judged(model: Path, broken: Path, located, stereo, tmp_path):
    says = r"images show nothing \(values that are not finite.*'a photo of a doctor', seed 50.* \(untreated\)"
    common = ("--model", broken, "--steps", 1, "--quiet", "--accelerator", "cpu", "-o", tmp_path / "out")
    result = stereo("bench", *common, "--limit", 2, "--images", 2, "--group-images", 0, "--seed", 50)
    assert result.exit_code == 3 and re.search(says, result.stderr), result.stderr
    assert result.stdout == "" and not (tmp_path / "out" / "results.json").exists()
    result = stereo("apply", "a photo of a doctor", "--mask", located, "--force", "--seed", 50, "-n", 2, *common)
    assert result.exit_code == 3 and re.search(says, result.stderr), result.stderr
    assert result.stdout == "" and not (tmp_path / "out" / "side_by_side.png").exists()
    assert len(result.stderr.splitlines()[-1]) < 700


def test_a_model_whose_predictions_are_not_finite_is_not_located_or_planned(broken: Path, located, stereo, tmp_path):
    common = ("--model", broken, "--limit", 1, "--seeds", 1, "--quiet", "--accelerator", "cpu", "-o", tmp_path / "m.pt")
    for code, command in (
        (3, ("locate",)),
        (2, ("plan", "--until", 300)),
        (2, ("mask", located, "--dose", 5, "--confirm", 0, "--force")),
    ):
        result = stereo(*command, *common)
        last = result.stderr.splitlines()[-1]
        assert result.exit_code == code and re.search(r"at timestep 999 of 'a photo of a doctor', seed \d", last), last
        assert "leaves" not in result.stdout and not (tmp_path / "m.pt").exists()


def test_json_is_json_where_a_figure_is_not_finite(capsys: pytest.CaptureFixture[str]):
    def refuse(text: str) -> None:
        raise AssertionError(text)

    terminal.print_json({"kl": float("inf"), "rows": [{"kappa": float("nan"), "n": 2}]})
    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {"kl": None, "rows": [{"kappa": None, "n": 2}]}
