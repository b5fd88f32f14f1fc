"""What is asked of a diffusers scheduler beyond its `step`: seeds, set-up, and the clean latents of a prediction.

Nothing here lists schedulers by name: what one takes is read off the signature of its `step`, and its noise level off
what it does to the model's input.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError

_NEEDED = ("set_timesteps", "scale_model_input", "step")


def takes(scheduler: Any, option: str) -> bool:
    """Whether the scheduler's `step` has a parameter of this name."""
    return option in inspect.signature(scheduler.step).parameters


def check(scheduler: Any, model: str) -> None:
    """Refuse a scheduler that cannot be walked from noise and text alone, each sample by its own seed.

    Raises:
        InputError: It lacks a method, its step needs more than prediction, timestep and sample, or it draws noise
            from elsewhere than a generator that it is given.
    """
    name = type(scheduler).__name__
    advice = "give the pipeline another, such as DDIMScheduler or EulerDiscreteScheduler"
    missing = [each for each in _NEEDED if not hasattr(scheduler, each)]
    if missing:
        raise InputError(f"model {model!r}: its {name} has no {missing[0]}; {advice}")
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    required = [each.name for each in parameters[3:] if each.default is each.empty and each.kind != each.VAR_KEYWORD]
    if required:
        raise InputError(f"model {model!r}: a step of its {name} needs {', '.join(required)}; {advice}")
    if takes(scheduler, "s_noise") and not takes(scheduler, "generator"):
        raise InputError(
            f"model {model!r}: its {name} adds noise that cannot be seeded sample by sample, so a seed would not name"
            f" a picture; {advice}"
        )


def set_up(scheduler: Any, steps: int, device: torch.device) -> Tensor:
    """Start a run of `steps` steps; the timesteps, noisiest first.

    Raises:
        InputError: The scheduler cannot make so many steps, or its timesteps rise.
    """
    name = type(scheduler).__name__
    try:
        scheduler.set_timesteps(steps, device=device)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{name} cannot make {steps} steps: {error}") from error
    timesteps: Tensor = scheduler.timesteps
    if len(timesteps) > 1 and timesteps[0] < timesteps[-1]:
        raise InputError(f"{name} walks from a picture to noise; use the scheduler that it inverts")
    # As the pipelines do: a timestep that occurs twice does not say which of the two is meant.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return timesteps


def step_options(scheduler: Any, generators: list[torch.Generator] | None) -> dict[str, Any]:
    """What `step` is given beside prediction, timestep and sample: eta 0, as the pipelines' default is, and seeds."""
    options: dict[str, Any] = {"eta": 0.0} if takes(scheduler, "eta") else {}
    return options if generators is None else {**options, "generator": generators}


def clean(scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
    """The clean latents that a prediction amounts to, before any clipping.

    With the latents brought to unit variance, z = alpha x_0 + sigma eps, alpha^2 + sigma^2 = 1:

        epsilon   x_0 = (z - sigma eps) / alpha      (Ho et al. 2020, eq. 15)
        v         x_0 = alpha z - sigma v            (Salimans and Ho 2022, appendix D)
        sample    x_0 = prediction

    and z = (1 - sigma) x_0 + sigma eps, x_0 = z - sigma v for flows. `scheduler.step` would say it too, but moves
    on in doing so.

    Args:
        scheduler: At this timestep: between `scale_model_input` and `step`.
        prediction: (B, C, h, w).
        timestep: The one it was made at.
        latents: (B, C, h, w), as the scheduler steps them.

    Returns:
        (B, C, h, w).

    Raises:
        InputError: The scheduler's kind of prediction, or its noise level, is not known.
    """
    # Called for what it does to the scheduler, too: it finds out which step this is.
    scale = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep))
    if hasattr(scheduler, "precondition_outputs"):  # EDM (Karras et al. 2022, eq. 7)
        found: Tensor = scheduler.precondition_outputs(latents, prediction, scheduler.sigmas[scheduler.step_index])
        return found
    kind = scheduler.config.get("prediction_type")
    if kind == "sample":
        return prediction
    alpha, sigma = (scale, (1 - scale**2) ** 0.5) if scale != 1 else _level(scheduler, timestep)
    z = scale * latents
    if kind == "epsilon":
        return (z - sigma * prediction) / alpha
    if kind == "v_prediction":
        return alpha * z - sigma * prediction
    if kind == "flow_prediction":
        return z - sigma * prediction
    raise InputError(f"{type(scheduler).__name__} has prediction type {kind!r}; clean latents follow from epsilon or v")


def _level(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """Alpha and sigma at a timestep, for a scheduler whose latents are the model's input as they are."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        index = scheduler.step_index
        if index is None:  # nothing was stepped yet
            index = getattr(scheduler, "begin_index", None) or 0
        sigma = float(sigmas[index])
        if scheduler.config.get("use_flow_sigmas", False):
            return 1 - sigma, sigma
        return 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"{type(scheduler).__name__} does not say how noisy a timestep is; use DDIMScheduler")
    share = float(scheduler.alphas_cumprod[int(timestep)])
    return share**0.5, (1 - share) ** 0.5
