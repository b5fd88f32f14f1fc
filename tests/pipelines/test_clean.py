"""The clean picture of a prediction: what the pipeline itself would decode, and differentiable in the prediction."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_table import SMALL
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines import clean
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.clean import clean_latents, decode_with_grad, denoised
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import Row, generator

ROWS: list[Row] = [{"prompt": "a photo of a doctor", "seed": 0}, {"prompt": "a photo of a nurse", "seed": 1}]


def model_of(name: str) -> Model:
    return Model(build(name), name, call=dict(TINY[name].call))


def drawn(model: Model, output: str) -> Tensor:
    """What the pipeline's own call ends in."""
    found: Tensor = model.pipe(
        prompt=[row["prompt"] for row in ROWS],
        generator=[generator(row, "noise") for row in ROWS],
        num_inference_steps=2,
        output_type=output,
        **model.call,
    ).images
    return found


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "sana", "pixart-sigma"])
def test_pictures_are_decoded_as_the_pipeline_decodes_them(name: str) -> None:
    model = model_of(name)
    pictures = decode_with_grad(model, drawn(model, "latent"))
    torch.testing.assert_close(pictures.clamp(0, 1), drawn(model, "pt"), atol=1e-5, rtol=0)
    assert not pictures.requires_grad and pictures.std() > 0.01


def test_an_autoencoder_may_have_a_mean_and_a_deviation() -> None:
    """As Playground 2.5's."""
    model = model_of("sdxl")
    plain = drawn(model, "pt")
    model.pipe.vae.register_to_config(latents_mean=[-1.0, 0.5, 0.0, 2.0], latents_std=[2.0, 1.0, 0.5, 3.0])
    pictures = decode_with_grad(model, drawn(model, "latent"))
    torch.testing.assert_close(pictures.clamp(0, 1), drawn(model, "pt"), atol=1e-5, rtol=0)
    assert not torch.allclose(pictures.clamp(0, 1), plain, atol=0.01)


def test_decoding_is_differentiable_and_its_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("sd1")
    latents = (3 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    direct = model.pipe.vae.decode(latents / model.pipe.vae.config.scaling_factor).sample / 2 + 0.5
    (expected,) = torch.autograd.grad(direct.square().sum(), latents)
    assert direct.detach().aminmax().max > 1  # not clamped, so that a gradient comes from everywhere
    for positions in (10**6, 1):
        monkeypatch.setattr(clean, "POSITIONS", positions)
        pictures = decode_with_grad(model, latents)
        (grad,) = torch.autograd.grad(pictures.square().sum(), latents)
        torch.testing.assert_close(pictures, direct, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-4)


def test_an_autoencoder_that_overflows_decodes_in_float32() -> None:
    """In half precision its values leave the range; the pipeline too upcasts it, and puts it back."""
    model = model_of("sdxl")
    vae = model.pipe.vae
    assert vae.config.force_upcast
    for weight in vae.decoder.conv_in.parameters():
        weight.data *= 2e4
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = decode_with_grad(model, latents)
    model.pipe.to(dtype=torch.float16)
    assert not vae.decode(latents.half() / vae.config.scaling_factor).sample.isfinite().all()
    half = latents.half().requires_grad_()
    pictures = decode_with_grad(model, half)
    torch.testing.assert_close(pictures, expected, atol=1e-2, rtol=1e-2)
    (grad,) = torch.autograd.grad(pictures.sum(), half)
    assert grad.dtype == torch.float16 and grad.isfinite().all()
    assert model.pipe.vae is vae and vae.dtype == torch.float16


def test_clean_latents_of_a_flow_undo_its_noise() -> None:
    """z = (1 - s) x_0 + s eps and v = eps - x_0, so x_0 = z - s v at every timestep."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(4)
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler.set_begin_index(i)
        scheduler._step_index = None
        seen = scheduler.scale_noise(x, timestep[None], noise)
        torch.testing.assert_close(denoised(scheduler, noise - x, timestep, seen), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "output"), [("sd1", 1), ("sd3", 1), ("lumina2", -1), ("pixart-sigma", 1)])
def test_a_walk_s_last_clean_latents_are_near_where_it_ends(name: str, output: int) -> None:
    """With the sign and the channels that the scheduler is given, at any family's step."""
    model, found = model_of(name), []

    def visit(call: Call) -> None:
        assert call.sign == output
        found.append(clean_latents(model, call, call.own()))
        part = clean_latents(model, call, call.own()[1:], slice(1, 2))
        torch.testing.assert_close(part, found[-1][1:])

    ended = Walk(model, ROWS, 8, 1.0, visit=visit).run().images
    distances = [float((each - ended).norm() / ended.norm()) for each in found]
    assert distances[-1] < 0.3 and distances[-1] < distances[0]


@pytest.mark.parametrize(
    ("name", "says"), [("flux", "FluxPipeline packs its latents"), ("z-image", "ZImagePipeline packs its latents")]
)
def test_latents_that_are_no_picture_are_refused(name: str, says: str) -> None:
    model = model_of(name)
    walk = Walk(model, ROWS, 2, 1.0, visit=lambda call: clean_latents(model, call, call.own()))
    with pytest.raises(InputError, match=f"target classifier: {says}.*use another target"):
        walk.run()


def test_an_autoencoder_without_a_scale_is_refused() -> None:
    model = Model(build("qwen-image"), call=SMALL)
    with pytest.raises(InputError, match="AutoencoderKLQwenImage of this model names no scaling_factor"):
        decode_with_grad(model, torch.zeros(1, 4, 8, 8))
