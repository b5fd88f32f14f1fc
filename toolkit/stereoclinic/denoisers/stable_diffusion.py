"""Stable Diffusion 1.x and 2.x, and the embedded model: a UNet with one text encoder."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.prompts import noise

#: Schedulers whose step draws from a generator by default: what is drawn would depend on the batch and the device.
STOCHASTIC = frozenset(
    {
        "CMStochasticIterativeScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DPMSolverSDEScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "LCMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
    }
)


@dataclass(frozen=True)
class Defaults:
    """How a model is sampled where the user does not say: read from `stereoclinic.json` beside its model_index.json."""

    steps: int = 50
    guidance: float = 7.5


class StableDiffusion:
    """A pipeline seen as a function of latents, timestep and text states.

    Args:
        pipe: The pipeline; its weights are frozen here.
        model: The name it was asked for by, kept in files.
        folder: Where it lies, if it is local.

    Raises:
        InputError: The model inpaints, or its scheduler draws noise at every step.
    """

    def __init__(self, pipe: StableDiffusionPipeline, model: str = "", folder: Path | None = None) -> None:
        self.pipe, self.model, self.folder = pipe, model, folder
        self.unet = pipe.unet.eval().requires_grad_(False)
        pipe.vae.eval().requires_grad_(False)
        pipe.text_encoder.eval().requires_grad_(False)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (self.unet.config.in_channels, height, width)
        if self.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise InputError(
                f"model {model!r}: its UNet takes {self.unet.config.in_channels} channels, its autoencoder makes"
                f" {pipe.vae.config.latent_channels}; inpainting variants are not supported"
            )
        scheduler = type(pipe.scheduler).__name__
        algorithm = str(pipe.scheduler.config.get("algorithm_type", ""))
        if scheduler in STOCHASTIC or algorithm.startswith("sde-"):
            raise InputError(
                f"model {model!r}: its {scheduler} adds new noise at every step, so a seed would not name a picture;"
                " give the pipeline another, such as DDIMScheduler or EulerDiscreteScheduler"
            )
        settings = folder / "stereoclinic.json" if folder else None
        self.defaults = Defaults(**json.loads(settings.read_text())) if settings and settings.is_file() else Defaults()
        self._encoded: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def to(self, device: torch.device | str) -> "StableDiffusion":
        self.pipe.to(device)
        self._encoded.clear()
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text states (B, L, D) in the UNet's dtype, by the pipeline's `encode_prompt`; each text is encoded once."""
        new = [text for text in dict.fromkeys(prompts) if text not in self._encoded]
        if len(self._encoded) + len(new) > 4096:  # a data set of many prompts must not fill the memory
            self._encoded.clear()
            new = list(dict.fromkeys(prompts))
        if new:
            states, _ = self.pipe.encode_prompt(new, self.device, 1, do_classifier_free_guidance=False)
            self._encoded.update(zip(new, states, strict=True))
        # The UNet alone is cast in a run of another precision.
        return torch.stack([self._encoded[text] for text in prompts]).to(self.unet.dtype)

    def noise(self, rows: list[dict]) -> Tensor:
        """The starting latents (B, C, h, w) of samples, each from its own prompt and seed.

        Call `timesteps` first: some schedulers' starting noise depends on the steps they were set up for.
        """
        start = torch.stack([noise(row, self.latent_shape) for row in rows])
        return (start * self.pipe.scheduler.init_noise_sigma).to(self.device, self.unet.dtype)

    def timesteps(self, steps: int) -> Tensor:
        """Set the scheduler up for `steps` steps and return its timesteps, noisiest first."""
        self.pipe.scheduler.set_timesteps(steps, device=self.device)
        return self.pipe.scheduler.timesteps

    def predict(self, latents: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """The denoiser's own output (epsilon or v) for each sample: (B, C, h, w)."""
        scaled = self.pipe.scheduler.scale_model_input(latents, timestep)
        return self.unet(scaled, timestep, encoder_hidden_states=states).sample

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """One step of the scheduler, to the latents of the next timestep."""
        return self.pipe.scheduler.step(prediction, timestep, latents).prev_sample

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        scaled = latents.to(self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor
        parts = [self.pipe.vae.decode(part).sample for part in scaled.split(64)]
        return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)
