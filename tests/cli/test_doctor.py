"""`stereo doctor`: the report agrees with what the toolkit says of the model, and the exit code with the verdict."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from safetensors.torch import load_file, save_file

from stereoclinic import check, load_prompts, open_model, with_seeds
from stereoclinic.calls.diagnosis import describe
from stereoclinic.ddtd.conservation import Conservation
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.sets import generator

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def variant(model, tmp_path: Path):
    """A copy of the tiny model with its UNet's configuration, or its weights, changed."""

    def make(weights: dict[str, float] | None = None, **config: object) -> Path:
        folder = tmp_path / "variant"
        shutil.copytree(model, folder)
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        tensors = load_file(folder / "unet" / WEIGHTS)
        for name, value in (weights or {}).items():
            tensors[name].view(-1)[0] = value
        save_file(tensors, folder / "unet" / WEIGHTS)
        return folder

    return make


def first_call(opened: Model) -> Conservation:
    """The check of what the bare pipeline tells its denoiser first, for the first prompt and seed 0."""
    row, seen = with_seeds(load_prompts("portraits"), 0, 1)[0], []
    handle = opened.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    options = {"num_inference_steps": opened.defaults.steps, "guidance_scale": opened.defaults.guidance}
    opened.pipe(prompt=[row["prompt"]], generator=[generator(row, "noise")], **options)
    handle.remove()
    args, kwargs = seen[0]
    text = [kwargs["encoder_hidden_states"]]
    return check(opened.network, lambda: opened.network(*args, **{**kwargs, "return_dict": True}).sample, text=text)


def test_a_model_that_is_supported(model, stereo) -> None:
    result = stereo("doctor", "--model", model, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    opened = open_model(model)
    sites, outcome = find_sites(opened.network), first_call(opened)
    assert data["supported"] and data["uncovered"] == {}
    assert data["neurons"]["sites"] == len(sites)
    assert data["neurons"]["neurons"] == sum(site.width for site in sites)
    for kind, row in data["neurons"]["kinds"].items():
        assert row == {
            "sites": sum(site.kind == kind for site in sites),
            "neurons": sum(site.width for site in sites if site.kind == kind),
        }
    assert {row["stream"] for row in data["neurons"]["streams"]} == {"image"}
    about = data["model"]
    assert about["family"] == "StableDiffusionPipeline" and about["unet"] == "UNet2DConditionModel"
    # Without guidance: one call, all of whose rows see the prompt, through the text states alone.
    assert about["calls"] == [[True]] and about["conditions"] == ["encoder_hidden_states"]
    assert about["told"] == about["timesteps"] and len(about["timesteps"]) == 2
    size = opened.pipe.unet.config.sample_size
    assert about["latents"] == [opened.pipe.unet.config.in_channels, size, size]
    found = data["conservation"]
    assert found["conserves"] and found["error"] < 1e-5
    assert [cut["before"] for cut in found["cuts"]] == [cut.before for cut in outcome.cuts]
    for row, cut in zip(found["cuts"], outcome.cuts, strict=True):
        assert row["sum"] == pytest.approx(1, abs=1e-5)
        for name in ("hidden", "skips", "time", "text", "bias"):
            assert row[name] == pytest.approx(cut.shares[name] / outcome.total, abs=1e-6)
    weights = sum(parameter.numel() for parameter in opened.network.parameters())
    assert data["model"]["parameters"] == weights
    memory = data["memory"]
    assert memory["unet_weights"] == 4 * weights
    assert memory["batch_total"] == 4 * weights + memory["batch"] * outcome.kept_bytes
    assert [each["name"] for each in data["devices"] if each["used"]]
    assert data["next"] == f"stereo locate --model {model}"


def test_the_tables_say_the_same(model, stereo) -> None:
    data = json.loads(stereo("doctor", "--model", model, "--json").stdout)
    result = stereo("doctor", "--model", model)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    for cut in data["conservation"]["cuts"]:
        cells = [f"{100 * cut[name]:.2f}" for name in ("hidden", "skips", "time", "text", "bias", "sum")]
        (line,) = [line for line in lines if line.strip().startswith(f"{cut['before']} ")]
        assert line.split()[1:7] == cells
    assert f"{data['neurons']['neurons']:,}" in result.stdout
    assert "none: every operation that mixes its inputs has a rule" in result.stdout
    assert "rounding: relevance adds up at every cut" in " ".join(result.stdout.split())
    assert lines[-2] == "verdict: this model is supported with epsilon-cp"
    for name in ("locate", "plan", "bench"):
        assert f"stereo {name}" in result.stdout
    assert lines[-1] == f"next: {data['next']}"
    assert max(map(len, lines[:-1])) <= 110


@pytest.mark.parametrize(
    ("composite", "says"),
    [("epsilon-attnlrp", "does not conserve through softmax, by definition"), ("gradient", "plain gradients have no")],
)
def test_what_does_not_conserve_by_definition_is_supported(model, stereo, composite: str, says: str) -> None:
    result = stereo("doctor", "--model", model, "--composite", composite, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert not data["conservation"]["conserves"] and says in data["conservation"]["meaning"]
    assert data["next"].endswith(f"--composite {composite}")


def test_what_layers_absorb_is_said_to_go_with_their_biases(model, stereo) -> None:
    for composite, absorbs in (("epsilon-cp", False), ("gamma-cp", True)):
        result = stereo("doctor", "--model", model, "--composite", composite)
        assert result.exit_code == 0, result.stderr
        said = " ".join(result.stdout.split())
        assert ("all that layers with a rule of their own absorb" in said) == absorbs
        assert "rounding: relevance adds up at every cut" in said


def test_an_uncovered_operation_is_named_and_refused(variant, stereo) -> None:
    folder = variant(act_fn="mish")
    result = stereo("doctor", "--model", folder)
    assert result.exit_code == 2
    assert "torch.nn.functional.mish: " in result.stdout
    assert "what is not covered was passed by its own gradient" in " ".join(result.stdout.split())
    *_, word, following = result.stdout.splitlines()
    assert "is not supported with epsilon-cp" in word and "without a rule" in word
    assert following == f"next: stereo doctor --model {folder} --composite gradient"
    result = stereo("doctor", "--model", folder, "--composite", "gradient")
    assert result.exit_code == 0


def test_a_model_whose_values_are_no_numbers(variant, stereo) -> None:
    result = stereo("doctor", "--model", variant({"mid_block.resnets.0.conv1.weight": math.nan}), "--json")
    assert result.exit_code == 2
    data = json.loads(result.stdout)
    assert not data["supported"] and data["conservation"]["cuts"] == []
    assert "entering `up_blocks.0`" in data["conservation"]["fault"] and "entering `up_blocks.0`" in data["verdict"]
    assert data["conservation"]["error"] is None


def test_a_mute_model_is_one_clear_line(variant, stereo) -> None:
    folder = variant()
    tensors = load_file(folder / "unet" / WEIGHTS)
    save_file({n: x * 0 if n.startswith("conv_out") else x for n, x in tensors.items()}, folder / "unet" / WEIGHTS)
    result = stereo("doctor", "--model", folder)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "zero everywhere" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "nowhere.ckpt"), "nowhere.ckpt"),
        (("--model", "."), "model_index.json"),
        (("--composite", "lrp"), "'lrp'"),
        (("--accelerator", "abacus"), "abacus"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_bad_input_is_one_clear_line(
    stereo, tmp_path: Path, monkeypatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = stereo("doctor", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("stereo: ") and says in line


def test_a_pipeline_that_is_for_something_else_is_one_clear_line(stereo, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "transformer": ["a", "b"]}))
    result = stereo("doctor", "--model", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "is a WanPipeline: it makes videos" in line


def test_both_rows_of_guidance_are_told(model, stereo) -> None:
    data = json.loads(stereo("doctor", "--model", model, "--guidance", 3, "--json").stdout)
    assert data["model"]["calls"] == [[False, True]] and data["model"]["guidance"] == 3


@pytest.mark.parametrize(("scheduler", "draws"), [(DDIMScheduler, False), (EulerAncestralDiscreteScheduler, True)])
def test_whether_a_scheduler_draws(model, scheduler: type, draws: bool) -> None:
    opened = open_model(model)
    opened.pipe.scheduler = scheduler.from_config(opened.pipe.scheduler.config)
    state = torch.get_rng_state()
    about = describe(opened, [4, 8, 8], 2, 1.0)
    assert about.draws == draws
    assert about.scheduler == scheduler.__name__
    assert torch.equal(torch.get_rng_state(), state)
