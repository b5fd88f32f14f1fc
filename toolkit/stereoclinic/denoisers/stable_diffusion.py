"""Stable Diffusion 1.x and 2.x, and the embedded model: a UNet with one text encoder."""

from torch import Tensor

from stereoclinic.denoisers.base import Denoiser


class StableDiffusion(Denoiser):
    """A `StableDiffusionPipeline`; 2.x differs in what it predicts (v), which its scheduler knows."""

    def _encode(self, texts: list[str]) -> Tensor:
        states: Tensor = self.pipe.encode_prompt(texts, self.device, 1, do_classifier_free_guidance=False)[0]
        return states
