"""Models that a command refuses: not there, damaged, of another kind, with options that its pipeline does not take."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tests.cli.conftest import AXIS_FILE
from tests.pipelines.tiny import save

from stereoclinic.errors import UncoveredOperation


def test_a_hub_model_brings_no_reader_and_is_not_fetched_to_find_out(refused, monkeypatch):
    monkeypatch.setattr("stereoclinic.pipelines.open_model", None)
    line = refused("bench", "--model", "nobody/nothing")
    assert "'nobody/nothing' has no reader, because it is not a local folder; give --reader clip" in line


def test_an_operation_without_a_rule(refused, model, monkeypatch):
    def find_sites(*_):
        raise UncoveredOperation("fft has no relevance rule")

    monkeypatch.setattr("stereoclinic.ddtd.locate.find_sites", find_sites)
    line = refused("locate", "--model", model, "--every", 1, "--bins", 2, "--limit", 1, "--quiet")
    assert "fft has no relevance rule" in line


def test_an_unknown_model_without_a_network(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-m", "stereo_cli", "locate", "--model", "nobody/nothing"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith(
        "stereo: model 'nobody/nothing' is not a built-in model (portraits, portraits-flow), a pipeline folder"
    )
    assert "HF_HUB_OFFLINE is set" in line
    assert run.stdout == ""


def test_a_damaged_model_folder(refused, model, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in refused("locate", "--model", "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text((model / "model_index.json").read_text())
    assert "broken: broken cannot be opened" in refused("locate", "--model", "broken")


def test_weights_of_a_dtype_or_variant_that_is_not_there(refused, model):
    line = refused("locate", "--model", model, "--dtype", "int8")
    assert "dtype 'int8': weights are loaded in float32, bfloat16, float16" in line
    assert "cannot be opened" in refused("locate", "--model", model, "--variant", "ema")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("StableDiffusionImg2ImgPipeline", "it starts from a given image; give the text-to-image model"),
        ("StableDiffusionInpaintPipeline", "it fills in parts of a given image"),
        ("StableDiffusionControlNetPipeline", "a ControlNet steers it by images"),
        ("TextToVideoSDPipeline", "it makes videos"),
        ("NoSuchPipeline", "does not have; install a version that does"),
    ],
)
def test_a_pipeline_that_is_not_from_text_to_picture(refused, opening, model, tmp_path: Path, kind: str, says: str):
    shutil.copytree(model, tmp_path / "other")
    index = (model / "model_index.json").read_text().replace("StableDiffusionPipeline", kind)
    (tmp_path / "other" / "model_index.json").write_text(index)
    for command in opening:
        line = refused(*("other" if each == model else each for each in command))
        assert f"model 'other' is a {kind}" in line and says in line, command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--call", "true_cfg_scale=4"), "'true_cfg_scale' is not taken by StableDiffusionPipeline; it takes "),
        (("--call", "output_type=latent"), "call option 'output_type' is set by stereo itself"),
        (("--call", "guidance_scale=3"), "call option 'guidance_scale' is set by stereo itself"),
        (("--call", "blurry"), "--call 'blurry': expected KEY=VALUE, such as true_cfg_scale=4"),
        (("--call", "=4"), "--call '=4': expected KEY=VALUE"),
        (("--call", "eta=0", "--call", "eta=1"), "eta is given twice"),
        (("--height", 64, "--call", "height=64"), "height is given twice"),
        (("--height", 64), "only height is given; give both --height and --width"),
        (("--height", 20, "--width", 20), "divisible by 8"),
        (("--call", "height=tall", "--width", 64), "StableDiffusionPipeline refuses its call (2 steps)"),
    ],
)
def test_options_of_the_pipelines_own_call(refused, opening, arguments: tuple, says: str):
    for command in opening:
        assert says in refused(*command, *arguments), command


def test_a_denoiser_that_keeps_a_state_between_calls(refused, opening, monkeypatch: pytest.MonkeyPatch):
    forward, calls = UNet2DConditionModel.forward, []

    @functools.wraps(forward)
    def stateful(self, sample, *args, **kwargs):
        calls.append(sample)
        return forward(self, sample + len(calls) % 2, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", stateful)
    for command in opening:
        assert "it keeps a state between calls" in refused(*command), command


def test_a_text_encoder_that_gives_the_same_for_every_prompt(refused, opening, model, tmp_path: Path):
    shutil.copytree(model, tmp_path / "mute")
    (path,) = (tmp_path / "mute" / "text_encoder").glob("*.safetensors")
    state = load_file(path)
    save_file({name: 0 * value for name, value in state.items()}, path, {"format": "pt"})
    for command in opening:
        line = refused(*("mute" if each == model else each for each in command))
        assert "no argument of its denoiser depends on the prompt" in line, command


@pytest.mark.parametrize("command", [("locate",), ("plan", "--until", 0)])
def test_groups_that_the_model_does_not_tell_apart(refused, model, tmp_path: Path, command: tuple):
    words = (
        AXIS_FILE.format('["female", "male"]').replace('= "female"', '= "flying"').replace('= "male"', '= "swimming"')
    )
    (tmp_path / "mine.toml").write_text(words)
    save("sd1", tmp_path / "sd1")  # to whose tokenizer they are two unknown words
    small = ("--axis", "mine.toml", "--limit", 1, "--steps", 2, "--height", 16, "--width", 16, "--quiet")
    line = refused(*command, "--model", "sd1", *small)
    assert "is the same as 'a photo of a flying doctor' to this model" in line
    (tmp_path / "long.txt").write_text(f"a photo {'of a doctor ' * 40}and a {{group}} nurse")
    line = refused(*command, "--model", model, "--prompts", "long.txt", "--quiet")
    assert "is the same as" in line and "that the prompt is not too long for the model" in line


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "reader/model.safetensors"])
def test_truncated_weights(refused, model, tmp_path: Path, part: str):
    shutil.copytree(model, tmp_path / "cut")
    whole = (tmp_path / "cut" / part).read_bytes()
    (tmp_path / "cut" / part).write_bytes(whole[: len(whole) // 2])
    says = "no portraits reader in cut/reader: " if "reader" in part else "cannot be opened"
    assert says in refused("bench", "--model", "cut")
