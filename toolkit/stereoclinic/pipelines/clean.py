"""The clean picture that a prediction amounts to, for targets that look at it."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stereoclinic.errors import InputError
from stereoclinic.pipelines import schedulers
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.model import Model

#: Latent positions decoded together: four pictures of 512 x 512, one of 1024 x 1024.
POSITIONS = 4 * 64 * 64
#: Autoencoder -> the same in float32.
_WIDE: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


def clean_latents(model: Model, call: Call, prediction: Tensor, part: slice = slice(None)) -> Tensor:
    """The clean latents (n, C, h, w) that predictions (n, D) amount to, differentiable in them.

    Raises:
        InputError: The pipeline packs its latents, changes the prediction before the scheduler gets it, or has a
            scheduler that does not say how clean latents follow.
    """
    latents, sign = call.latents(part), call.sign
    if not isinstance(latents, Tensor) or latents.ndim != 4 or latents[0].numel() != prediction.shape[1] or not sign:
        raise InputError(
            f"target classifier: {type(model.pipe).__name__} packs its latents, so the picture that a prediction"
            " amounts to cannot be had; use another target"
        )
    timestep = torch.tensor(call.timestep)
    return schedulers.clean(model.pipe.scheduler, sign * prediction.view(latents.shape), timestep, latents)


def decode_with_grad(model: Model, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), about [0, 1] but not clamped, differentiable in the latents.

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
