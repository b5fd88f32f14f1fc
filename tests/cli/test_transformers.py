"""Every command on pipelines whose denoiser is a transformer: one guided in a batch, one with guidance built in."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tests.cli.conftest import Call
from tests.evaluation.test_results_schema import VALID
from tests.pipelines.tiny import save

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.select import neurons_of

READER = '''
import torch

class Bright:
    """Reads gender off how bright a picture is."""

    name, classes = "bright", {"gender": ("female", "male")}

    def read(self, images):
        p = images.mean((1, 2, 3)).clamp(0.05, 0.95)
        return {"gender": torch.stack([p, 1 - p], 1)}
'''
CALL = {"height": 16, "width": 16, "max_sequence_length": 24}
OPTIONS = ("--height", 16, "--width", 16, "--call", "max_sequence_length=24")
SMALL = ("--limit", 1, "--seeds", 1, "--steps", 2, "--quiet")


@pytest.fixture(scope="module", params=["flux", "sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp("transformers") / request.param)


@pytest.fixture
def done(stereo: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call the command line in a folder of its own; return what it printed, and what it said beside."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[str, str]:
        result = stereo(*arguments)
        assert result.exit_code == 0, result.stderr
        return result.stdout, result.stderr

    return call


def test_from_locate_to_apply(folder: Path, done, tmp_path: Path):
    flux = folder.name == "flux"
    done("locate", "--model", folder, *OPTIONS, *SMALL, "--until", 0, "-o", "g.pt")
    relevance = Relevance.load("g.relevance.safetensors")
    # Guidance that is built in is not turned off, and few steps are all measured, in a bin each.
    assert relevance.metadata["guidance"] == (3.5 if flux else 1.0)
    assert relevance.metadata["call"] == NeuronMask.load("g.pt").metadata["call"] == CALL
    assert len(relevance.timesteps) == len(relevance.bin_edges) - 1 == 2
    assert {site.stream for site in relevance.sites} == ({"image", "text", "joint"} if flux else {"image", "text"})

    out, _ = done("inspect", "g.relevance.safetensors", "--picture", "map.png", "--images", "responses", "--top", 2)
    assert "text" in out and Image.open("map.png").width > 300
    index = json.loads(Path("responses/index.json").read_text())
    assert index["call"] == CALL and len(index["neurons"]) == 2

    done("mask", "g.relevance.safetensors", "--kinds", "attention:text", "--until", 0, "--mu", 0, "-o", "text.pt")
    mask = NeuronMask.load("text.pt")
    damped, text = (mask.factors < 1).any(0), neurons_of(mask.sites, ["attention:text"])
    assert damped.any() and not (damped & ~text).any() and 0 < text.sum() < len(text)

    planning = ("--until", 0, "--mu", 0.001, "--keep", 0, "--stay", "none", "--replans", 1, "--check", 1)
    out, _ = done("plan", "g.relevance.safetensors", *SMALL, *planning, "-o", "a.pt")
    mask = NeuronMask.load("a.pt")
    assert mask.allocates and (mask.factors < 1).any() and mask.metadata["call"] == CALL
    assert "--call height=16 --call max_sequence_length=24 --call width=16" in out.splitlines()[-1]

    Path("bright.py").write_text(READER)
    drawing = ("--model", folder, "--steps", 2, "--mask", "a.pt", "--quiet")
    reading = ("--reader", "bright.py:Bright", "--allow-code", "--limit", 1, "--images", 2, "--group-images", 1)
    _, said = done("bench", *drawing, *OPTIONS, *reading, "-o", "b")
    results = json.loads(Path("b/results.json").read_text())
    VALID.validate(results)
    assert results["provenance"]["call"] == CALL and "made with other call options" not in said
    assert list(results["experiments"][0]["arms"]) == ["untreated", "a", "random", "allocation oracle"]

    _, said = done("apply", "a photo of a doctor", *drawing, "--height", 32, "--width", 16, "-n", 2, "-o", "c")
    (note,) = [line for line in said.splitlines() if line.startswith("note: ")]
    assert "mask a.pt was made with other call options (height=16 max_sequence_length=24 width=16)" in note
    assert note.endswith("than are used now (height=32 width=16)")
    lines = [json.loads(line) for line in Path("c/images/metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["call"] == {"height": 32, "width": 16} for line in lines)
    assert Image.open(tmp_path / "c/images" / lines[0]["file_name"]).size == (16, 32)


def test_doctor(folder: Path, done):
    flux = folder.name == "flux"
    out, _ = done("doctor", "--model", folder, *OPTIONS, "--limit", 1, "--steps", 2, "--json")
    data = json.loads(out)
    about = data["model"]
    assert about["family"] == ("FluxPipeline" if flux else "StableDiffusion3Pipeline")
    assert about["unet"] == ("FluxTransformer2DModel" if flux else "SD3Transformer2DModel")
    assert about["calls"] == ([[True]] if flux else [[False, True]])
    assert {"encoder_hidden_states", "pooled_projections"} <= set(about["conditions"])
    scale = 1000 if flux else 1
    assert [scale * each for each in about["told"]] == pytest.approx(about["timesteps"])
    streams = {row["stream"] for row in data["neurons"]["streams"]}
    assert streams == ({"image", "text", "joint"} if flux else {"image", "text"})
    assert data["uncovered"] == {} and data["conservation"]["conserves"]
    assert {"image", "modulation", "text", "bias"} <= set(data["conservation"]["cuts"][0])
    assert data["time"]["commands"]["locate"]["price"]["minutes"] > 0 and about["call"] == CALL
    assert "--call max_sequence_length=24" in data["next"]
    out, _ = done("doctor", "--model", folder, *OPTIONS, "--limit", 1, "--steps", 2)
    assert "verdict: this model is supported with epsilon-cp" in out and "modulation" in out
    assert max(map(len, out.splitlines()[:-1])) <= 110
