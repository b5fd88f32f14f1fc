"""Our sampling loop against diffusers' own, and what makes a sample's noise."""

from copy import copy

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from stereoclinic.denoisers.sampling import sample
from stereoclinic.denoisers.stable_diffusion import StableDiffusion
from stereoclinic.errors import InputError
from stereoclinic.prompts import load_prompts, with_seeds


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_loop_draws_what_the_pipeline_draws(denoiser: StableDiffusion, guidance: float) -> None:
    rows = list(with_seeds(load_prompts("portraits", 2), 0, 1))
    prompts = [row["prompt"] for row in rows]
    ours = sample(denoiser, rows, prompts, 3, guidance)
    theirs = denoiser.pipe(
        prompts, num_inference_steps=3, guidance_scale=guidance, latents=denoiser.noise(rows), output_type="pt"
    ).images
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)


def test_a_picture_belongs_to_its_prompt_and_seed_not_to_its_batch(denoiser: StableDiffusion) -> None:
    rows = list(with_seeds(load_prompts("portraits", 3), 0, 2))
    together = sample(denoiser, rows, [row["prompt"] for row in rows], 2, 2.0)
    for i in (0, 4):
        alone = sample(denoiser, [rows[i]], [rows[i]["prompt"]], 2, 2.0)
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)
    assert not torch.equal(together[0], together[3])  # same prompt, other seed


def test_the_conditional_prediction_can_be_replaced(denoiser: StableDiffusion) -> None:
    rows = list(with_seeds(load_prompts("portraits", 2), 0, 1))
    prompts = [row["prompt"] for row in rows]
    asked = []

    def own(model, latents, timestep, done, states):
        asked.append(done)
        return model.predict(latents, timestep, states)

    same = sample(denoiser, rows, prompts, 4, 2.0, own)
    torch.testing.assert_close(same, sample(denoiser, rows, prompts, 4, 2.0), atol=1e-4, rtol=0)
    assert asked == [0, 0.25, 0.5, 0.75]


def with_scheduler(denoiser: StableDiffusion, kind: type, **config: object) -> StableDiffusion:
    pipe = copy(denoiser.pipe)
    pipe.scheduler = kind.from_config(denoiser.pipe.scheduler.config, **config)
    return StableDiffusion(pipe, "random")


def test_the_first_picture_of_a_scheduler_is_as_its_second(denoiser: StableDiffusion) -> None:
    """The size of the starting noise follows from the steps, which must be set before it is drawn."""
    fresh = with_scheduler(denoiser, EulerDiscreteScheduler, timestep_spacing="leading")
    row = with_seeds(load_prompts("portraits", 1), 0, 1)[0]
    first, second = (sample(fresh, [row], [row["prompt"]], 2, 1.0) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("kind", "config"), [(DDPMScheduler, {}), (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"})]
)
def test_schedulers_that_draw_noise_are_refused(denoiser: StableDiffusion, kind: type, config: dict) -> None:
    with pytest.raises(InputError, match="adds new noise at every step"):
        with_scheduler(denoiser, kind, **config)
    with_scheduler(denoiser, DPMSolverMultistepScheduler)
