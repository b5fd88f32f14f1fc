"""What a pipeline must be, how it is prepared, and which options its call takes."""

import json
from copy import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from tests.pipelines.tiny import REFUSED, build
from tests.pipelines.tiny_parts import CLIP_WIDTH, unet
from tests.pipelines.tiny_table import SMALL
from tests.pipelines.tiny_unets import stable_diffusion
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.pipelines.images import draw
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.model import RESERVED, Defaults, Model, check_class

ROWS = [{"prompt": "a photo of a doctor", "seed": 0}, {"prompt": "a photo of a nurse", "seed": 1}]


@pytest.fixture(scope="module")
def sd1() -> DiffusionPipeline:
    """A pipeline that tests leave as it is."""
    return build("sd1")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("img2img", "is a StableDiffusionImg2ImgPipeline: it starts from a given image"),
        ("inpaint", "it fills in parts of a given image; give the text-to-image model"),
        ("controlnet", "a ControlNet steers it by images; give the model without it"),
        ("kandinsky22", "two denoisers, a prior and a decoder"),
        ("wan", "is a WanPipeline: it makes videos"),
        ("dit", "it takes no prompt"),
    ],
)
def test_other_pipelines_are_refused_by_their_class(name: str, says: str) -> None:
    assert name in REFUSED
    with pytest.raises(InputError, match=f"model 'it' .*{says}"):
        Model(build(name), "it")


@pytest.mark.parametrize(
    ("kind", "components", "says"),
    [
        (diffusers.AudioLDM2Pipeline, ["unet"], "it makes sound"),
        (diffusers.KandinskyV22Pipeline, ["unet"], r"it draws from the output of another model \(a prior\)"),
        (diffusers.WuerstchenCombinedPipeline, ["decoder", "prior_prior"], "two denoisers, a prior and a decoder"),
        (diffusers.StableDiffusionPipeline, ["vae"], "one denoiser is expected, .*; found none"),
        (diffusers.FluxPipeline, ["transformer", "transformer_2"], "found transformer, transformer_2"),
    ],
)
def test_a_class_is_refused_by_its_call_and_its_parts(kind: type, components: list[str], says: str) -> None:
    with pytest.raises(InputError, match=f"is a {kind.__name__}: .*{says}"):
        check_class(kind, components, "it")


def test_the_refiner_is_refused() -> None:
    pipe = build("sdxl")
    pipe.text_encoder = pipe.tokenizer = None
    with pytest.raises(InputError, match=r"SDXL refiner .* give the base model"):
        Model(pipe, "refiner")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"in_channels": 9}, "takes 9 channels, its autoencoder makes 4; inpainting"),
        ({"class_embed_type": "timestep"}, "its denoiser takes class labels"),
        ({"num_class_embeds": 3}, "its denoiser takes class labels"),
    ],
)
def test_unets_that_take_more_than_text_are_refused(config: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Model(stable_diffusion(unet=unet(CLIP_WIDTH, **config)))


def test_a_unet_that_its_own_pipeline_refuses_is_refused_in_its_words() -> None:
    """SDXL's refiner in a base model's pipeline takes five sizes, not six."""
    pipe, five = build("sdxl"), 5 * 4 + 20
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    pipe.unet = unet(20, **added, projection_class_embeddings_input_dim=five, use_linear_projection=True)
    with pytest.raises(InputError, match=r"StableDiffusionXLPipeline .*length 40, but a vector of 44 was created"):
        learnt_of(Model(pipe, call=SMALL), 1.0)


def test_a_denoiser_that_keeps_a_cache_is_refused() -> None:
    pipe = build("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(InputError, match=r"keeps a cache between calls.*call disable_cache\(\) on it"):
        Model(pipe)
    pipe.transformer.disable_cache()
    Model(pipe)


def test_all_parts_are_frozen_and_at_rest() -> None:
    pipe = build("sd3")
    for part in (pipe.transformer, pipe.text_encoder_3, pipe.vae):
        part.train()
    before = {name: part.training for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    assert before["text_encoder_3"] and not before["text_encoder"]
    Model(pipe, prepare=False)
    assert {name: getattr(pipe, name).training for name in before} == before
    Model(pipe)
    for name in before:
        assert not any(module.training for module in getattr(pipe, name).modules())
        assert not any(weight.requires_grad for weight in getattr(pipe, name).parameters())


class Censor(nn.Module):
    """Calls every picture unsafe, and paints it black."""

    def forward(self, images: Any, clip_input: Tensor) -> tuple[Any, list[bool]]:
        return 0 * images, [True] * len(images)


def test_a_safety_checker_is_taken_out() -> None:
    pipe = build("sd1")
    pipe.safety_checker = Censor()
    assert not draw(Model(build("sd1"), call=SMALL), ROWS, 2, 1.0).eq(0).all()
    model = Model(pipe, call=SMALL)
    assert pipe.safety_checker is None
    assert torch.equal(draw(model, ROWS, 2, 1.0), draw(Model(build("sd1"), call=SMALL), ROWS, 2, 1.0))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"hight": 512}, r"'hight' is not taken by StableDiffusionPipeline; it takes .*guidance_rescale, height, "),
        ({"true_cfg_scale": 4.0}, "'true_cfg_scale' is not taken by StableDiffusionPipeline"),
        *(
            ({name: None}, f"call option '{name}' is set by stereo itself; it takes ")
            for name in ("prompt", "latents", "output_type", "generator", "num_images_per_prompt", "prompt_embeds")
        ),
        ({"callback_on_step_end_tensor_inputs": []}, "is not taken by"),
    ],
)
def test_options_that_the_call_does_not_take_are_refused(sd1: DiffusionPipeline, option: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Model(sd1, call=option)


def test_options_of_the_call_reach_the_picture(sd1: DiffusionPipeline) -> None:
    wide = Model(sd1, call={"height": 16, "width": 32})
    assert draw(wide, ROWS, 1, 2.0).shape == (2, 3, 16, 32)
    other = Model(sd1, call={"height": 16, "width": 32, "negative_prompt": "old"})
    assert not torch.equal(draw(wide, ROWS[:1], 2, 3.0), draw(other, ROWS[:1], 2, 3.0))
    assert wide.options(2.0) == {"height": 16, "width": 32, "guidance_scale": 2.0}
    assert not RESERVED & wide.options(2.0).keys() - {"guidance_scale"}


def test_defaults_are_those_of_the_pipeline_s_own_call(sd1: DiffusionPipeline) -> None:
    assert Model(sd1).defaults == Defaults(50, 7.5)
    assert Model(build("sdxl")).defaults == Defaults(50, 5.0)
    assert Model(build("flux")).defaults == Defaults(28, 3.5)


def test_defaults_lie_beside_the_model(sd1: DiffusionPipeline, tmp_path: Path) -> None:
    text = '{"steps": 4, "guidance": 2.0, "call": {"height": 64}}'
    (tmp_path / "stereoclinic.json").write_text(text)
    model = Model(sd1, folder=tmp_path, call={"width": 128})
    assert model.defaults == Defaults(4, 2.0, {"height": 64}) and model.call == {"height": 64, "width": 128}
    assert Model(sd1, folder=tmp_path, call={"height": 32}).call == {"height": 32}
    for wrong in (
        {"stairs": 4},
        {"steps": 0},
        {"steps": "four"},
        {"guidance": -1},
        {"guidance": "much"},
        {"call": 3},
        [4],
    ):
        (tmp_path / "stereoclinic.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"model.s defaults .*stereoclinic.json: "):
            Model(sd1, folder=tmp_path)


def test_a_call_without_a_guidance_scale_takes_none() -> None:
    model = Model(build("qwen-image"), call={"true_cfg_scale": 3.0})
    assert model.options(model.defaults.guidance) == {"true_cfg_scale": 3.0}
    with pytest.raises(InputError, match=r"guidance 5: QwenImagePipeline takes no guidance_scale.*true_cfg_scale"):
        model.options(5.0)


def test_the_denoiser_is_the_one_that_is_in_the_pipeline_now(sd1: DiffusionPipeline) -> None:
    model = Model(copy(sd1))
    assert model.network is sd1.unet and model.dtype == torch.float32
    other = unet(CLIP_WIDTH).double()
    model.replace(other)
    assert model.network is model.pipe.unet is other and model.dtype == torch.float64
    assert sd1.unet is not other
    assert Model(build("sd3")).network is not None
