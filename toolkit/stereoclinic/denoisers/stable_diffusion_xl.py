"""Stable Diffusion XL's base model: two text encoders, and a pooled text and the picture's size beside the states.

    states (B, L, D)      what cross attention reads
    pooled (B, P)         joins the timestep's embedding, with the sizes

travel as one tensor, the pooled text in rows of its own below the states, so that whoever pairs, stacks or caches
prompts need not know that there are two.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import pad

from stereoclinic.denoisers.base import Defaults, Denoiser
from stereoclinic.errors import InputError


class StableDiffusionXL(Denoiser):
    """A `StableDiffusionXLPipeline`; its refiner is none: that finishes the pictures of another model.

    An autoencoder that overflows in float16, as its configuration says (`force_upcast`), is kept in float32.

    Raises:
        InputError: See `Denoiser`; also for the refiner.
    """

    own_defaults: ClassVar[Defaults] = Defaults(guidance=5.0)
    added: ClassVar[str | None] = "text_time"

    def __init__(self, pipe: DiffusionPipeline, model: str = "", folder: Path | None = None) -> None:
        if pipe.text_encoder is None or pipe.config.get("requires_aesthetics_score"):
            raise InputError(
                f"model {model!r} is an SDXL refiner (it lacks the first text encoder), which only finishes another"
                " model's pictures; give the base model"
            )
        super().__init__(pipe, model, folder)
        self.pooled_width = int(pipe.text_encoder_2.config.projection_dim)
        expected = self.unet.add_embedding.linear_1.in_features
        if expected != 6 * self.unet.config.addition_time_embed_dim + self.pooled_width:
            raise InputError(
                f"model {model!r}: its UNet takes an added embedding of {expected}, which is not six sizes of"
                f" {self.unet.config.addition_time_embed_dim} and a pooled text of {self.pooled_width}; give an SDXL"
                " base model"
            )
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)

    def _encode(self, texts: list[str]) -> Tensor:
        """(B, L + ceil(P / D), D); "" is zeros where the pipeline says so (`force_zeros_for_empty_prompt`)."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        width = states.shape[-1]
        rows = -(-self.pooled_width // width)
        packed = pad(pooled.to(states), (0, rows * width - self.pooled_width)).unflatten(1, (rows, width))
        together = torch.cat([states, packed], dim=1)
        if self.pipe.config.force_zeros_for_empty_prompt:
            together[[not text for text in texts]] = 0
        return together

    def _conditions(self, states: Tensor) -> dict[str, Any]:
        rows = -(-self.pooled_width // states.shape[-1])
        _, height, width = (self.pipe.vae_scale_factor * size for size in self.latent_shape)
        # Original size, crop, target size: an uncropped picture of the size that is drawn.
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=states.dtype, device=states.device)
        return {
            "encoder_hidden_states": states[:, :-rows],
            "added_cond_kwargs": {
                "text_embeds": states[:, -rows:].flatten(1)[:, : self.pooled_width],
                "time_ids": sizes.expand(len(states), -1),
            },
        }

    def _unscale(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super()._unscale(latents)
        mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, std))
        unscaled: Tensor = latents * std / config.scaling_factor + mean
        return unscaled
