"""The clean image that a prediction stands for, for targets that look at the image."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stereoclinic.errors import InputError
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.model import Model

#: Latent positions decoded together: four pictures of 512 x 512, one of 1024 x 1024.
POSITIONS = 4 * 64 * 64
#: Autoencoder -> the same in float32.
_WIDE: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


def clean_latents(model: Model, call: Call, prediction: Tensor, part: slice = slice(None)) -> Tensor:
    """The clean latents (n, C, h, w) of predictions (n, D), differentiable in them.

    Raises:
        InputError: The pipeline packs its latents, changes the prediction before the scheduler gets it, or has a
            scheduler that does not say how clean latents follow.
    """
    latents, sign = call.latents(part), call.sign
    if not isinstance(latents, Tensor) or latents.ndim != 4 or latents[0].numel() != prediction.shape[1] or not sign:
        raise InputError(
            f"target classifier: {type(model.pipe).__name__} packs its latents, so the clean image of a prediction is"
            " unknown; use another target"
        )
    timestep = torch.tensor(call.timestep)
    return denoised(model.pipe.scheduler, sign * prediction.view(latents.shape), timestep, latents)


def decode_with_grad(model: Model, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W), about [0, 1] but not clamped, differentiable in the latents.

    A few are decoded at a time, and decoded again in the backward pass, so that memory does not grow with the batch.

    Raises:
        InputError: The autoencoder does not say how its latents are scaled.
    """
    vae = _in_range(model.pipe.vae)
    config = vae.config
    if config.get("scaling_factor") is None:
        raise InputError(f"target classifier: the {type(vae).__name__} of this model names no scaling_factor")

    def decode(part: Tensor) -> Tensor:
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(part) for each in (mean, std))
            part = part * std / config.scaling_factor + mean
        else:
            part = part / config.scaling_factor + (config.get("shift_factor") or 0.0)
        pictures: Tensor = vae.decode(part, return_dict=False)[0]
        return pictures.float() / 2 + 0.5

    parts = latents.to(vae.dtype).split(max(1, POSITIONS // (latents.shape[-2] * latents.shape[-1])))
    if not (torch.is_grad_enabled() and latents.requires_grad):
        return torch.cat([decode(part) for part in parts])
    return torch.cat([checkpoint(decode, part, use_reentrant=False) for part in parts])


def _in_range(vae: Any) -> Any:
    """The autoencoder, or its copy in float32 where it overflows in half precision, as its pipeline upcasts it."""
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
        return vae
    if vae not in _WIDE:
        _WIDE[vae] = copy.deepcopy(vae).float()
    return _WIDE[vae].to(vae.device)


def denoised(scheduler: Any, prediction: Tensor, timestep: Tensor, seen: Tensor) -> Tensor:
    """The clean latents of a prediction, before any clipping.

    With the latents brought to unit variance, z = alpha x_0 + sigma eps, alpha^2 + sigma^2 = 1:

        epsilon   x_0 = (z - sigma eps) / alpha      (Ho et al. 2020, eq. 15)
        v         x_0 = alpha z - sigma v            (Salimans and Ho 2022, appendix D)
        sample    x_0 = prediction

    and z = (1 - sigma) x_0 + sigma eps, x_0 = z - sigma v for flows. `scheduler.step` returns it too, but
    moves on.

    Nothing here lists schedulers by name: the noise level is read off what a scheduler does to the model's input.

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
    # This call also has the scheduler find out which step it is at.
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
        raise InputError(f"{type(scheduler).__name__} gives no noise level for a timestep; use DDIMScheduler")
    share = float(scheduler.alphas_cumprod[int(timestep)])
    return share**0.5, (1 - share) ** 0.5
