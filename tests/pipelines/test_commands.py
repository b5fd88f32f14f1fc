"""`stereo locate`, `plan`, `bench` and `apply` on every pipeline class, from the command line."""

import json
from pathlib import Path

import pytest
from tests.pipelines.test_conformance import NOT_SUPPORTED
from tests.pipelines.tiny import TINY, save
from typer.testing import CliRunner

from stereo_cli.main import app
from stereoclinic.sns.mask import NeuronMask

READER = """
import torch

class Bright:
    "Takes pictures that are bright on the left for female."
    name, classes = "bright", {"gender": ("female", "male")}

    def read(self, images):
        left, right = (half.mean((1, 2, 3)) for half in images.chunk(2, dim=3))
        share = torch.sigmoid(100 * (left - right))
        return {"gender": torch.stack([share, 1 - share], 1)}
"""


def run(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": None}).invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", [name for name in TINY if name not in NOT_SUPPORTED])
def test_the_commands_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY[name]
    monkeypatch.chdir(tmp_path)
    save(name, tmp_path / "model")
    Path("reader.py").write_text(READER)
    steps = ["--steps", tiny.steps, "--accelerator", "cpu", "--quiet"]
    model = ["--model", "model", *steps, *(f"--call={key}={json.dumps(value)}" for key, value in tiny.call.items())]
    if tiny.guidance is not None:
        model += ["--guidance", tiny.guidance]
    few = ["--limit", 2, "--seeds", 1]
    run("locate", *model, *few, "--select", "top-k", "--top", 0.5, "-o", "located.pt")
    located = NeuronMask.load("located.pt")
    assert located.metadata["call"] == tiny.call and (located.factors < 1).any()

    run("plan", *model, "--limit", 1, "--seeds", 1, "--until", 0, "-o", "planned.pt")
    planned = NeuronMask.load("planned.pt")
    assert planned.allocates and (planned.factors < 1).any()

    run("apply", "a photo of a doctor", *model, "--mask", "located.pt", "--images", 1, "-o", "applied")
    assert len(list(Path("applied").rglob("*.png"))) >= 2

    judged = ["--limit", 1, "--images", 2, "--group-images", 0, "--seed", 50]
    run("bench", *model, *judged, "--mask", "planned.pt", "--reader", "reader.py:Bright", "--allow-code", "-o", "bench")
    (results,) = json.loads(Path("bench/results.json").read_text())["experiments"]
    assert list(results["arms"])[:2] == ["untreated", "planned"]
    assert Path("bench/report.html").is_file()
