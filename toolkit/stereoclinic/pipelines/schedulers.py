"""What is asked of a diffusers scheduler beyond its `step`: seeds, and the clean latents of a prediction.

Nothing here lists schedulers by name: what one takes is read off the signature of its `step`, and its noise level off
what it does to the model's input.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError

_NEEDED = ("set_timesteps", "step")


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


def clean(scheduler: Any, prediction: Tensor, timestep: Tensor, seen: Tensor) -> Tensor:
    """The clean latents that a prediction amounts to, before any clipping.

    With the latents brought to unit variance, z = alpha x_0 + sigma eps, alpha^2 + sigma^2 = 1:

        epsilon   x_0 = (z - sigma eps) / alpha      (Ho et al. 2020, eq. 15)
        v         x_0 = alpha z - sigma v            (Salimans and Ho 2022, appendix D)
        sample    x_0 = prediction

    and z = (1 - sigma) x_0 + sigma eps, x_0 = z - sigma v for flows. `scheduler.step` would say it too, but moves
    on in doing so.

    Args:
        scheduler: At this timestep, before its `step`.
        prediction: (B, C, h, w).
        timestep: The one it was made at.
        seen: (B, C, h, w), the latents as the denoiser sees them: z, or the scheduler's own times its scale.

    Returns:
        (B, C, h, w).

    Raises:
        InputError: The scheduler's kind of prediction, or its noise level, is not known.
    """
    # Called for what it does to the scheduler, too: it finds out which step this is.
    scale = 1.0
    if hasattr(scheduler, "scale_model_input"):
        scale = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep))
    if hasattr(scheduler, "precondition_outputs"):  # EDM (Karras et al. 2022, eq. 7)
        found: Tensor = scheduler.precondition_outputs(seen / scale, prediction, scheduler.sigmas[scheduler.step_index])
        return found
    kind = scheduler.config.get("prediction_type", "flow_prediction" if "Flow" in type(scheduler).__name__ else None)
    if kind == "sample":
        return prediction
    alpha, sigma = (scale, (1 - scale**2) ** 0.5) if scale != 1 else _level(scheduler, timestep)
    z = seen
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
        if scheduler.config.get("use_flow_sigmas", False) or "Flow" in type(scheduler).__name__:
            return 1 - sigma, sigma
        return 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"{type(scheduler).__name__} does not say how noisy a timestep is; use DDIMScheduler")
    share = float(scheduler.alphas_cumprod[int(timestep)])
    return share**0.5, (1 - share) ** 0.5
