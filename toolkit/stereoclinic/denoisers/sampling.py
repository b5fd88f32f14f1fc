"""The guided sampling loop, with one seam: who makes the conditional prediction of a step."""

from collections.abc import Callable

import torch
from torch import Tensor

from stereoclinic.denoisers.base import Denoiser
from stereoclinic.prompts import Row

# (denoiser, latents (B, C, h, w), timestep, share of the run that is done, text states) -> prediction (B, C, h, w)
Conditional = Callable[[Denoiser, Tensor, Tensor, float, Tensor], Tensor]


def guide(conditional: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6, in diffusers' scale: 1 is no guidance)."""
    return conditional if unconditional is None else unconditional + guidance * (conditional - unconditional)


def predict_guided(
    denoiser: Denoiser, latents: Tensor, timestep: Tensor, states: Tensor, empty: Tensor, guidance: float
) -> Tensor:
    """The guided prediction, unconditional half first in the batch, as diffusers' pipelines do it."""
    if guidance <= 1:
        return denoiser.predict(latents, timestep, states)
    both = denoiser.predict(torch.cat([latents, latents]), timestep, torch.cat([empty, states]))
    unconditional, conditional = both.chunk(2)
    return guide(conditional, unconditional, guidance)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    rows: list[Row],
    prompts: list[str],
    steps: int,
    guidance: float,
    conditional: Conditional | None = None,
) -> Tensor:
    """Draw one picture a row.

    Args:
        denoiser: The model.
        rows: Samples; each one's noise follows from its `prompt` and `seed`, also that which a scheduler adds.
        prompts: What each picture is conditioned on, which need not be the row's own neutral prompt.
        steps: Of the scheduler.
        guidance: Scale of classifier-free guidance; 1 or less runs without the unconditional half.
        conditional: Replaces the conditional prediction; the oracles use it.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    return denoiser.decode(sample_latents(denoiser, rows, prompts, steps, guidance, conditional))


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    rows: list[Row],
    prompts: list[str],
    steps: int,
    guidance: float,
    conditional: Conditional | None = None,
) -> Tensor:
    """The clean latents (B, C, h, w) of the pictures that `sample` draws; arguments as there."""
    timesteps = denoiser.timesteps(steps)
    generators = denoiser.generators(rows)
    latents = denoiser.noise(rows)
    states = denoiser.encode(prompts)
    empty = denoiser.encode([""] * len(rows))
    for i, timestep in enumerate(timesteps):
        if conditional is None:
            prediction = predict_guided(denoiser, latents, timestep, states, empty, guidance)
        else:
            unconditional = denoiser.predict(latents, timestep, empty) if guidance > 1 else None
            own = conditional(denoiser, latents, timestep, i / len(timesteps), states)
            prediction = guide(own, unconditional, guidance)
        latents = denoiser.step(prediction, timestep, latents, generators)
    return latents
