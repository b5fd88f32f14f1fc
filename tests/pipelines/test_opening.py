"""Opening models: folders, variants, dtypes, single files, and one clear line for everything else. No network."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler
from safetensors.torch import save_file
from tests.pipelines.tiny import build
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.pipelines import model_folder, open_model, open_pipeline
from stereoclinic.pipelines.images import draw

#: The tiny pipelines' names in diffusers' layout -> in that of the original repositories.
RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip
UNET = [
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("conv_norm_out", "out.0"), ("conv_out", "out.2"), ("conv_in", "input_blocks.0.0"),
    ("down_blocks.0.resnets.0", "input_blocks.1.0"), ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
    ("down_blocks.1.resnets.0", "input_blocks.3.0"), ("down_blocks.1.attentions.0", "input_blocks.3.1"),
    ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("up_blocks.0.resnets.0", "output_blocks.0.0"), ("up_blocks.0.attentions.0", "output_blocks.0.1"),
    ("up_blocks.0.resnets.1", "output_blocks.1.0"), ("up_blocks.0.attentions.1", "output_blocks.1.1"),
    ("up_blocks.0.upsamplers.0", "output_blocks.1.2"),
    ("up_blocks.1.resnets.0", "output_blocks.2.0"), ("up_blocks.1.resnets.1", "output_blocks.3.0"),
]  # fmt: skip
VAE = [
    ("down_blocks.0.downsamplers.0", "down.0.downsample"), ("down_blocks.", "down."),
    ("up_blocks.0.upsamplers.0", "up.1.upsample"), ("up_blocks.0.", "up.1."), ("up_blocks.1.", "up.0."),
    ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"), ("resnets.", "block."),
    ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
    ("to_out.0", "proj_out"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
]  # fmt: skip


def renamed(name: str, table: list[tuple[str, str]]) -> str:
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


def original_layout(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The weights of a tiny Stable Diffusion 1 as its original repository names them."""
    weights = {}
    for name, value in pipe.unet.state_dict().items():
        name = renamed(renamed(name, UNET), RESNET if "resnets" in name else [])
        weights[f"model.diffusion_model.{name}"] = value
    for name, value in pipe.vae.state_dict().items():
        value = value[..., None, None] if re.search(r"to_(q|k|v|out\.0)\.weight", name) else value
        weights[f"first_stage_model.{renamed(name, VAE)}"] = value
    for name, value in pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name}"] = value
    return {name: value.contiguous() for name, value in weights.items()}


def same_weights(ours: DiffusionPipeline, theirs: DiffusionPipeline) -> bool:
    parts = {name for name, part in theirs.components.items() if isinstance(part, nn.Module)}
    assert parts == {name for name, part in ours.components.items() if isinstance(part, nn.Module)}
    return all(
        torch.equal(value, getattr(theirs, part).state_dict()[name])
        for part in parts
        for name, value in getattr(ours, part).state_dict().items()
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict], None]:
    """Lets an index be fetched, and nothing else."""

    def holds(index: dict) -> None:
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / "model_index.json").write_text(json.dumps(index))
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda model, name: tmp_path / "hub" / name)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", unreachable)
    return holds


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux", "sd3"])
def test_a_saved_pipeline_opens_as_it_was(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    pipe.save_pretrained(tmp_path / "model")
    model = open_model(tmp_path / "model", call={"height": 16})
    assert type(model.pipe) is type(pipe) and same_weights(model.pipe, pipe)
    assert (model.name, model.folder) == (str(tmp_path / "model"), tmp_path / "model")
    assert type(model.pipe.scheduler) is type(pipe.scheduler)
    assert not any(weight.requires_grad for weight in model.network.parameters())
    assert model.defaults.guidance == {"sd1": 7.5, "sdxl": 5.0, "flux": 3.5, "sd3": 7.0}[name]
    assert model.call == {"height": 16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    build("sd1").save_pretrained(tmp_path)
    model = open_model(tmp_path, dtype=dtype, call={"height": 16, "width": 16})
    assert {str(part.dtype) for part in (model.network, model.pipe.vae, model.pipe.text_encoder)} == {f"torch.{dtype}"}
    assert draw(model, [{"prompt": "a photo of a doctor", "seed": 0}], 1, 2.0).shape == (1, 3, 16, 16)


def test_an_unknown_dtype() -> None:
    with pytest.raises(InputError, match="dtype 'int8': weights are loaded in float32, bfloat16, float16"):
        open_model("portraits", dtype="int8")


def test_a_variant_is_opened_by_its_name(tmp_path: Path) -> None:
    pipe = build("sd1")
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert same_weights(open_pipeline(tmp_path, variant="fp16"), pipe)
    for variant in (None, "ema"):
        with pytest.raises(InputError, match="its variants: fp16"):
            open_pipeline(tmp_path, variant=variant)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_single_file_in_a_folder_of_configurations(tmp_path: Path, ending: str) -> None:
    pipe = build("sd1")
    pipe.save_pretrained(tmp_path)
    for path in tmp_path.glob("*/*.safetensors"):
        path.unlink()
    path = tmp_path / f"whole.{ending}"
    weights = original_layout(pipe)
    if ending == "ckpt":
        torch.save({"state_dict": weights, "global_step": 7}, path)
    else:
        save_file(weights, path)
    model = open_model(path, dtype="bfloat16")
    assert same_weights(model.pipe, pipe.to(dtype=torch.bfloat16))
    assert (model.name, model.folder) == (str(path), None)
    with pytest.raises(InputError, match="only folders have variants"):
        open_pipeline(path, variant="fp16")


@pytest.mark.parametrize("missing", ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.bias"])
def test_a_single_file_must_fill_its_configuration(tmp_path: Path, missing: str) -> None:
    """Diffusers would leave what is missing at random."""
    pipe = build("sd1")
    pipe.save_pretrained(tmp_path)
    weights = original_layout(pipe)
    del weights[missing]
    save_file(weights, tmp_path / "holey.safetensors")
    with pytest.raises(InputError, match=r"holds \d+ weights of a (unet|vae), its configuration .* asks for \d+; they"):
        open_pipeline(tmp_path / "holey.safetensors")


def test_a_single_file_alone_says_where_its_configuration_would_come_from(
    hub: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers picks it by the weights' shapes; the class is that of its index."""
    weights = original_layout(build("sd1"))
    asked = []

    def from_single_file(kind: type, path: str, **options: object) -> None:
        asked.append(kind.__name__)
        raise OSError("no network\nat all")

    monkeypatch.setattr(DiffusionPipeline, "from_single_file", classmethod(from_single_file), raising=False)
    for kind in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        monkeypatch.setattr(f"diffusers.{kind}.from_single_file", classmethod(from_single_file))
    save_file(weights, tmp_path / "v1.safetensors")
    xl = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)}
    save_file({**weights, **xl}, tmp_path / "xl.safetensors")
    with pytest.raises(
        InputError, match=r"kind 'v1'; its configuration .*stable-diffusion-v1-5.*: no route to host; or"
    ):
        open_pipeline(tmp_path / "v1.safetensors")
    hub({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(InputError, match=r"stable-diffusion-v1-5.*: no network; or put the file into a diffusers"):
        open_pipeline(tmp_path / "v1.safetensors")
    hub({"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(InputError, match=r"https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0.*: no net"):
        open_pipeline(tmp_path / "xl.safetensors")
    assert asked == ["StableDiffusionPipeline", "StableDiffusionXLPipeline"]


class Note:
    """Something in a pickle that is no weight."""


def test_files_that_are_no_checkpoint(hub: Callable, tmp_path: Path) -> None:
    hub({"_class_name": "StableDiffusionInpaintPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    nine = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}
    save_file(nine, tmp_path / "inpaint.safetensors")
    save_file({"lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    torch.save({"state_dict": nine, "note": Note()}, tmp_path / "code.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    (tmp_path / "notes.txt").write_text("hello")
    for name, says in (
        ("inpaint.safetensors", "is a StableDiffusionInpaintPipeline: it fills in parts of a given image"),
        ("lora.safetensors", "no denoiser in it"),
        ("torn.safetensors", "cannot be read as safetensors"),
        ("code.ckpt", "opening it could run code; convert it to .safetensors"),
        ("list.ckpt", "holds a list"),
        ("missing.safetensors", "no such file"),
        ("notes.txt", "a file; a diffusers pipeline is a folder"),
    ):
        with pytest.raises(InputError, match=says):
            open_pipeline(tmp_path / name)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"_class_name": "WanPipeline", "transformer": ["diffusers", "X"]}, "is a WanPipeline: it makes videos"),
        ({"_class_name": "FluxPipeline", "vae": ["diffusers", "X"]}, "one denoiser is expected, .*; found none"),
        (
            {"_class_name": "PipelineOfTomorrow"},
            "PipelineOfTomorrow, which diffusers .* does not have; install a version",
        ),
        ({"_class_name": "AutoencoderKL"}, "is a AutoencoderKL, which diffusers .* does not have"),
        ({"_class_name": "StableDiffusionXLInpaintPipeline", "unet": ["diffusers", "X"]}, "fills in parts"),
        (
            {
                "_class_name": "StableDiffusionXLImg2ImgPipeline",
                "text_encoder": [None, None],
                "text_encoder_2": ["transformers", "X"],
                "unet": ["diffusers", "X"],
            },
            "an SDXL refiner only finishes another model's images; give the base model",
        ),
        ({"_class_name": ["pipeline", "MyPipeline"]}, "code from models is not run"),
        ({"unet": ["diffusers", "X"]}, "names no _class_name"),
    ],
)
def test_a_folder_of_another_kind_is_refused_by_its_index_alone(tmp_path: Path, index: dict, says: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=says):
        open_pipeline(tmp_path)


def test_a_hub_model_of_another_kind_is_refused_before_its_weights_are_fetched(hub: Callable) -> None:
    hub({"_class_name": "FluxControlNetPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]})
    with pytest.raises(InputError, match=r"'someone/flux' is a FluxControlNetPipeline: a ControlNet steers it"):
        open_pipeline("someone/flux")


def test_a_hub_model_that_cannot_be_reached(hub: Callable) -> None:
    with pytest.raises(InputError, match=r"https://huggingface.co/some/model could not be fetched.*: no route to host"):
        open_pipeline("some/model")
    hub({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(InputError, match=r"its weights of variant 'fp16' could not be fetched from https://hugging"):
        open_pipeline("some/model", variant="fp16")


def test_the_built_in_model_is_a_folder() -> None:
    assert (model_folder("portraits") / "model_index.json").is_file()
    assert model_folder("some/model") is None


def single_file(
    folder: Path, scheduler: Any, keys: tuple[str, ...] = (), metadata: dict[str, str] | None = None
) -> Path:
    """A Stable Diffusion 1 file in a folder of configurations, with further weights and metadata."""
    pipe = build("sd1")
    pipe.scheduler = scheduler
    pipe.save_pretrained(folder)
    save_file(original_layout(pipe) | {key: torch.tensor([]) for key in keys}, folder / "v.safetensors", metadata)
    return folder / "v.safetensors"


@pytest.mark.parametrize(
    ("keys", "metadata", "changed"),
    [
        ((), None, {}),
        (("v_pred",), None, {"prediction_type": "v_prediction"}),
        (("v_pred", "ztsnr"), None, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ((), {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ((), {"modelspec.prediction_type": "epsilon"}, {}),
    ],
)
def test_a_single_file_predicts_what_it_says(tmp_path: Path, keys: tuple, metadata: dict | None, changed: dict) -> None:
    said: list[str] = []
    plain = DDIMScheduler(clip_sample=False, steps_offset=1)
    model = open_model(single_file(tmp_path, plain, keys, metadata), warn=said.append)
    config = model.pipe.scheduler.config
    assert {name: config[name] for name in config if name[0] != "_" and config[name] != plain.config[name]} == changed
    assert len(said) == bool(changed) and all(f"{name}={value}" in said[0] for name, value in changed.items())


def test_a_scheduler_that_cannot_do_what_a_single_file_says_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    open_model(single_file(tmp_path, PNDMScheduler(steps_offset=1), ("v_pred", "ztsnr")), warn=said.append)
    assert len(said) == 2 and "its PNDMScheduler does not know; give it a scheduler that does, such as DDIM" in said[0]
