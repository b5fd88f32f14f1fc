"""What all families share: a pipeline seen as a function of latents, timestep and text states.

    prompts --encode--> states (B, L, D)
    rows    --noise---> x --predict(x, t, states)--> prediction --step--> x of the next t ... --decode--> pictures
                                                          |
                                                          +--clean--> predicted clean latents

A family says how prompts are encoded into one tensor and what the UNet is given of it; see `stable_diffusion` for the
least that takes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stereoclinic.denoisers import schedulers
from stereoclinic.errors import InputError
from stereoclinic.prompts import Row, generator, noise
from stereoclinic.reading import read_json

#: Bytes of encoded prompts that are kept: a data set of many prompts must not fill the memory.
CACHE = 2**28
#: Bytes that an encoded prompt takes beside its states, or more: with short ones it counts.
OVERHEAD = 2**10
#: Latent positions decoded together: four pictures of 512 x 512, one of 1024 x 1024.
POSITIONS = 4 * 64 * 64


@dataclass(frozen=True)
class Defaults:
    """How a model is sampled where the user does not say: read from `stereoclinic.json` beside its model_index.json."""

    steps: int = 50
    guidance: float = 7.5


class Denoiser(ABC):
    """A pipeline with a UNet, frozen.

    Args:
        pipe: The pipeline; its weights are frozen here.
        model: The name it was asked for by, kept in files.
        folder: Where it lies, if it is local.

    Attributes:
        unet: The pipeline's denoising network.
        latent_shape: (C, h, w) of one sample.
        defaults: How the model is sampled where the user does not say.

    Raises:
        InputError: The UNet takes more than noisy latents, timestep and text (it inpaints, say), or the scheduler's
            steps cannot be seeded sample by sample.
    """

    #: Of the family, for models that bring no `stereoclinic.json`.
    own_defaults: ClassVar[Defaults] = Defaults()
    #: What the UNet adds to the embedding of the timestep (`addition_embed_type`), or None.
    added: ClassVar[str | None] = None

    def __init__(self, pipe: DiffusionPipeline, model: str = "", folder: Path | None = None) -> None:
        self.pipe, self.model, self.folder = pipe, model, folder
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        self.unet = pipe.unet
        self._check_unet()
        schedulers.check(pipe.scheduler, model)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (self.unet.config.in_channels, height, width)
        self.defaults = self._read_defaults()
        self._forget()

    def _check_unet(self) -> None:
        config, channels = self.unet.config, self.pipe.vae.config.latent_channels
        if config.in_channels != channels:
            raise InputError(
                f"model {self.model!r}: its UNet takes {config.in_channels} channels, its autoencoder makes"
                f" {channels}; inpainting and other image-conditioned variants are not supported, give the"
                " text-to-image model"
            )
        if config.get("time_cond_proj_dim") is not None:
            raise InputError(
                f"model {self.model!r}: its UNet takes the guidance scale as an input, as distilled consistency models"
                " do; not supported, give the model it was distilled from"
            )
        for name, expected in (
            ("addition_embed_type", self.added),
            ("class_embed_type", None),
            ("num_class_embeds", None),
            ("encoder_hid_dim_type", None),
        ):
            found = config.get(name)
            if found != expected:
                raise InputError(
                    f"model {self.model!r}: its UNet has {name} {found!r}, where {type(self).__name__} expects"
                    f" {expected!r}; models conditioned on more than text are not supported"
                )
        if config.sample_size is None:
            raise InputError(f"model {self.model!r}: its UNet's configuration names no sample_size; add one to it")

    def _read_defaults(self) -> Defaults:
        path = self.folder / "stereoclinic.json" if self.folder else None
        if path is None or not path.is_file():
            return self.own_defaults
        data = read_json(path, "model's defaults")
        try:
            found = Defaults(**data)
            if not (isinstance(found.steps, int) and found.steps >= 1 and float(found.guidance) >= 0):
                raise ValueError(f"steps {found.steps!r} and guidance {found.guidance!r}")
            return found
        except (TypeError, ValueError) as error:
            raise InputError(f'{path}: expected {{"steps": 50, "guidance": 7.5}}: {error}') from error

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    def to(self, device: torch.device | str) -> Self:
        self.pipe.to(device)
        self._forget()
        return self

    def replace(self, unet: nn.Module) -> None:
        """Have another UNet, of the same shape, in the pipeline."""
        self.unet = self.pipe.unet = unet

    def _forget(self) -> None:
        """Encoded prompts, and how many bytes they hold."""
        self._encoded: dict[str, Tensor] = {}
        self._held = 0

    @abstractmethod
    def _encode(self, texts: list[str]) -> Tensor:
        """(B, L, D) by the pipeline's own `encode_prompt`."""

    def _conditions(self, states: Tensor) -> dict[str, Any]:
        """What the UNet is given beside latents and timestep."""
        return {"encoder_hidden_states": states}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text states (B, L, D) in the UNet's dtype; "" is the family's unconditional prompt.

        One tensor, whatever the family; only its own `predict` needs to know what the rows are. Each text is encoded
        once.
        """
        if self._held > CACHE:
            self._forget()
        if new := [text for text in dict.fromkeys(prompts) if text not in self._encoded]:
            self._encoded.update(zip(new, self._encode(new), strict=True))
            self._held += sum(self._encoded[text].nbytes + OVERHEAD for text in new)
        # The UNet alone is cast in a run of another precision.
        return torch.stack([self._encoded[text] for text in prompts]).to(self.unet.dtype)

    def noise(self, rows: list[Row]) -> Tensor:
        """The starting latents (B, C, h, w) of samples, each from its own prompt and seed.

        Call `timesteps` first: some schedulers' starting noise depends on the steps they were set up for.
        """
        start = torch.stack([noise(row, self.latent_shape) for row in rows])
        scale: float | Tensor = self.pipe.scheduler.init_noise_sigma
        return (start * scale).to(self.device, self.unet.dtype)

    def generators(self, rows: list[Row]) -> list[torch.Generator] | None:
        """What each sample's steps draw from, seeded from its own prompt and seed; None if steps never draw.

        Make them once a run and pass them to every `step`: a picture then depends on its row alone, whatever the
        batch.
        """
        if not schedulers.takes(self.pipe.scheduler, "generator"):
            return None
        return [generator(row, "steps") for row in rows]

    def timesteps(self, steps: int) -> Tensor:
        """Set the scheduler up for `steps` steps and return its timesteps, noisiest first.

        There may be more timesteps than steps: schedulers of second order evaluate the model twice a step, and PNDM
        repeats one. Schedulers keep count, so `predict` and `step` are to visit them in this order.

        Raises:
            InputError: The scheduler cannot make so many steps, or walks from a picture to noise.
        """
        return schedulers.set_up(self.pipe.scheduler, steps, self.device)

    def predict(self, latents: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """The denoiser's own output (epsilon, v or clean latents) for each sample: (B, C, h, w)."""
        scaled = self.pipe.scheduler.scale_model_input(latents, timestep)
        prediction: Tensor = self.unet(scaled, timestep, **self._conditions(states)).sample
        return prediction

    def clean(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """The clean latents (B, C, h, w) that a prediction amounts to, differentiable in both.

        Call it between `predict` and `step` of a timestep.

        Raises:
            InputError: The scheduler does not say how they follow.
        """
        return schedulers.clean(self.pipe.scheduler, prediction, timestep, latents)

    def step(
        self,
        prediction: Tensor,
        timestep: Tensor,
        latents: Tensor,
        generators: list[torch.Generator] | None = None,
    ) -> Tensor:
        """One step of the scheduler, to the latents of the next timestep.

        Args:
            prediction: (B, C, h, w).
            timestep: The one it was made at.
            latents: (B, C, h, w).
            generators: One a sample, see `generators`; without them a scheduler that draws does so at random.
        """
        options = schedulers.step_options(self.pipe.scheduler, generators)
        following: Tensor = self.pipe.scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
        return following.to(latents.dtype)  # some schedulers' steps come out in float32

    def _unscale(self, latents: Tensor) -> Tensor:
        """The latents as the autoencoder made them."""
        scale: float = self.pipe.vae.config.scaling_factor
        return latents / scale

    def _decode(self, latents: Tensor) -> Tensor:
        pictures: Tensor = self.pipe.vae.decode(self._unscale(latents)).sample
        return pictures.float() / 2 + 0.5

    def decode_with_grad(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about [0, 1] but not clamped, differentiable in the latents.

        A few are decoded at a time, and decoded again in the backward pass, so that memory does not grow with the
        batch.
        """
        parts = latents.to(self.pipe.vae.dtype).split(max(1, POSITIONS // (latents.shape[-2] * latents.shape[-1])))
        if not (torch.is_grad_enabled() and latents.requires_grad):
            return torch.cat([self._decode(part) for part in parts])
        return torch.cat([checkpoint(self._decode, part, use_reentrant=False) for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        return self.decode_with_grad(latents).clamp(0, 1)
