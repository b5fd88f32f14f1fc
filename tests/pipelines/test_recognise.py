"""A plain call of a pipeline is recognised as a watched one is: its timesteps, its pictures, who sees the prompt."""

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_table import SMALL
from torch import nn

from stereoclinic.errors import InputError
from stereoclinic.pipelines.intercept import Pass, pass_of
from stereoclinic.pipelines.model import Defaults, Model, network_of, outer_network
from stereoclinic.pipelines.recognise import Recogniser
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import Row, generator

ROWS: list[Row] = [
    {"prompt": "a photo of a doctor", "seed": 0},
    {"prompt": "a photo of a nurse", "seed": 1},
    {"prompt": "a photo of a doctor", "seed": 2},
]
#: How they call their denoiser with guidance: once, with rows without prompt first; with them last; distilled, so that
#: the scale is an argument; twice.
NAMES = ["sd1", "sdxl", "pixart-sigma", "sd3", "z-image", "lcm", "flux", "flux2-klein", "lumina2", "chroma", "cogview4"]


def model_of(name: str) -> Model:
    return Model(build(name), name, call=dict(TINY[name].call))


def plain(model: Model, rows: list[Row], steps: int, **options: Any) -> None:
    """The pipeline's own call."""
    model.pipe(
        prompt=[row["prompt"] for row in rows],
        generator=[generator(row, "noise") for row in rows],
        num_inference_steps=steps,
        output_type="latent",
        **{**model.call, **options},
    )


def recognised(model: Model, rows: list[Row], steps: int, **options: Any) -> list[Pass]:
    """What each pass of a plain call is taken to be about."""
    recogniser, found = Recogniser(model), []

    def hear(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(recogniser.now(network, args, kwargs))

    with model.network.register_forward_pre_hook(hear, with_kwargs=True):
        plain(model, rows, steps, **options)
    return found


def watched(model: Model, rows: list[Row], steps: int, guidance: float) -> list[Pass]:
    """What each pass of the same call is about, as the watcher says."""
    found: list[Any] = []
    walk = Walk(model, rows, steps, guidance)
    with model.network.register_forward_pre_hook(lambda network, _: found.append(pass_of(network))):
        walk.run()
    return found


def same(one: list[Pass], two: list[Pass]) -> None:
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert (a.samples, a.conditional, a.total, a.treated) == (b.samples, b.conditional, b.total, b.treated)
        assert a.timestep == pytest.approx(b.timestep, abs=1e-2)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_plain_call_is_recognised_as_the_watched_one(name: str, guidance: float) -> None:
    """With equal prompts in a batch, at another number of steps than the pipeline's own, and for a single picture."""
    model = model_of(name)
    for rows, steps in ((ROWS, 3), (ROWS[:1], 2)):
        expected = watched(model, rows, steps, guidance)
        same(recognised(model, rows, steps, guidance_scale=guidance), expected)
        assert any(True in each.conditional for each in expected)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "flux2-klein"])
def test_prompts_that_are_compared_from_the_same_noise_are_no_halves_of_each_other(name: str, guidance: float) -> None:
    model, found = model_of(name), []
    recogniser = Recogniser(model)

    def hear(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(recogniser.now(network, args, kwargs))

    with model.network.register_forward_pre_hook(hear, with_kwargs=True):
        model.pipe(
            prompt=["a photo of a doctor", "a photo of a nurse"],
            generator=[torch.Generator().manual_seed(0) for _ in range(2)],
            num_inference_steps=1,
            guidance_scale=guidance,
            output_type="latent",
            **model.call,
        )
    same(found[:2], watched(model, ROWS[:2], 1, guidance)[:2])


def test_guidance_that_is_asked_for_in_a_call_alone_is_recognised() -> None:
    """Qwen-Image guides where it has a negative prompt, in a second call a step that was not learnt."""
    model = Model(build("qwen-image"), call=SMALL)
    alone = recognised(model, ROWS[:2], 2)
    assert [each.conditional for each in alone] == [(True, True)] * 2
    guided = recognised(model, ROWS[:2], 2, true_cfg_scale=3.0, negative_prompt=["old", "old"])
    assert [each.conditional for each in guided] == [(True, True), (False, False)] * 2


def test_guidance_that_the_pipeline_s_own_call_leaves_out_is_recognised() -> None:
    """A model whose defaults say no guidance, as a few-step model's do, called with a scale after all."""
    model = Model(build("sd1"), call=SMALL)
    model.defaults = Defaults(steps=2, guidance=1.0)
    expected = watched(model, ROWS, 2, 3.0)
    same(recognised(model, ROWS, 2, guidance_scale=3.0), expected)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_steps_of_second_order_have_the_timestep_of_each_of_their_calls(guidance: float) -> None:
    model = Model(build("sd1"), call=SMALL)
    model.pipe.scheduler = HeunDiscreteScheduler.from_config(model.pipe.scheduler.config)
    expected = watched(model, ROWS, 3, guidance)
    assert len(expected) == 5
    same(recognised(model, ROWS, 3, guidance_scale=guidance), expected)


@pytest.mark.parametrize(("name", "guidance"), [("sd1", 1.0), ("sd1", 3.0), ("flux2-klein", 1.0), ("flux2-klein", 3.0)])
def test_one_step_from_the_same_noise_is_recognised_again_and_again(name: str, guidance: float) -> None:
    """As two prompts are compared at one seed: the latents are those of the call before, and yet it is another."""
    model = model_of(name)
    if name == "sd1":
        model.pipe.scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)
    recogniser, found = Recogniser(model), []

    def hear(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(recogniser.now(network, args, kwargs))

    with model.network.register_forward_pre_hook(hear, with_kwargs=True):
        for prompt in ("a photo of a doctor", "a photo of a doctor", "a photo of a nurse"):
            model.pipe(
                prompt=prompt,
                generator=torch.Generator().manual_seed(0),
                num_inference_steps=1,
                guidance_scale=guidance,
                output_type="latent",
                **model.call,
            )
    each = len(found) // 3
    expected = watched(model, ROWS[:1], 1, guidance)
    for i in range(3):
        same(found[i * each : (i + 1) * each], expected)


def test_a_copy_of_a_recogniser_remembers_nothing_of_the_other_s_calls() -> None:
    model = model_of("flux2-klein")
    recogniser = Recogniser(model)
    given = {"hidden_states": torch.randn(1, 64, 16), "timestep": torch.tensor([1.0])}
    network = model.network
    assert [recogniser.now(network, (), given).conditional for _ in range(2)] == [(True,), (False,)]
    twin = copy.deepcopy(recogniser)
    assert twin.now(network, (), given).conditional == (True,)


def test_a_pipeline_is_learnt_without_being_prepared() -> None:
    pipe = build("sd1")
    pipe.text_encoder.train()
    recogniser = Recogniser(pipe)
    assert pipe.text_encoder.training and all(weight.requires_grad for weight in pipe.unet.parameters())
    latents = torch.randn(2, 4, 8, 8)
    now = recogniser.now(pipe.unet, (torch.cat([latents, latents]), 500), {"encoder_hidden_states": None})
    assert (now.samples, now.conditional, now.timestep) == ((0, 1, 0, 1), (False, False, True, True), 500)


# --- bare denoisers


@pytest.mark.parametrize(
    ("guided", "conditional"), [(None, (True,) * 4), (False, (True,) * 4), (True, (False, False, True, True))]
)
def test_a_bare_denoiser_s_batch_is_what_is_said_of_it(
    unet: nn.Module, guided: bool | None, conditional: tuple
) -> None:
    latents = torch.randn(4, 4, 8, 8)
    for args, kwargs in (((latents, 700), {}), ((latents,), {"timestep": torch.tensor([700] * 4)})):
        now = Recogniser(unet, guided).now(unet, args, {**kwargs, "encoder_hidden_states": None})
        assert (now.conditional, now.timestep) == (conditional, 700)
        assert now.samples == ((0, 1, 0, 1) if guided else (0, 1, 2, 3))


def test_a_call_that_cannot_be_told_is_refused(unet: nn.Module) -> None:
    latents = torch.randn(3, 4, 8, 8)
    with pytest.raises(InputError, match="a guided batch of 3 has no two halves; pass guided=False"):
        Recogniser(unet, True).now(unet, (latents, 700), {"encoder_hidden_states": None})
    with pytest.raises(InputError, match=r"timesteps \[1, 2, 3\] differ within a batch; a mask needs one"):
        Recogniser(unet).now(unet, (latents, torch.tensor([1, 2, 3])), {"encoder_hidden_states": None})
    silent = nn.Linear(2, 2)
    with pytest.raises(InputError, match="Linear was called without a timestep, which a mask needs"):
        Recogniser(silent).now(silent, (torch.ones(2),), {})


def test_the_denoiser_of_whatever_is_given() -> None:
    pipe = build("sd1")
    for target in (pipe, pipe.unet, Model(pipe)):
        assert network_of(target) is outer_network(target) is pipe.unet
    compiled = torch.compile(pipe.unet, backend="eager")
    pipe.unet = compiled
    assert network_of(pipe) is network_of(compiled) is compiled._orig_mod and outer_network(pipe) is compiled
    with pytest.raises(InputError, match="cannot damp a str; expected a diffusers pipeline"):
        network_of("a pipeline")
